"""Turns a bundle into one of lower precision, by statistics of real inputs."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from vlmport.api.bundle_folder import check_target, new_bundle
from vlmport.api.collect import CollectOptions, collect
from vlmport.api.default_samples import default_samples
from vlmport.api.float_budget import keep_within_budget
from vlmport.api.quantize_graphs import (
    DECODER,
    first_probes,
    open_graphs,
    second_probes,
    smooth,
    transform,
    without_outliers,
)
from vlmport.api.quantize_recipe import (
    RecipeOptions,
    kept_in_float,
    read_patterns,
    wanted_recipe,
)
from vlmport.api.quantize_report import QuantizeReport, report_json
from vlmport.api.quantized_bundle import write_bundle
from vlmport.calibration.half_precision import float32_ports
from vlmport.calibration.layers import find_layers
from vlmport.calibration.recipe import recipe_json
from vlmport.calibration.samples import load_samples
from vlmport.contract import Quantization, QuantizedGraph
from vlmport.errors import CalibrationError
from vlmport.manifest import load_manifest, verify_files

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from vlmport.api.progress import Progress
    from vlmport.api.quantize_graphs import GraphWork
    from vlmport.api.quantize_report import GraphReport
    from vlmport.calibration.recipe import Recipe
    from vlmport.calibration.samples import CalibrationSample
    from vlmport.calibration.statistics import Probe, Statistics
    from vlmport.contract import Manifest, Precision

__all__ = ["QuantizeOptions", "quantize"]

_RECIPE_FILE, _REPORT_FILE = "recipe.json", "quantization.json"
_PRECISIONS: MappingProxyType[str, Precision] = MappingProxyType(
    {"fp16": "float16", "bf16": "bfloat16"}
)


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What to make of which bundle.

    Attributes:
        bundle: folder of the bundle.
        target: folder to write.
        recipe: what becomes of each graph.
        calibration: folder or JSON lines of pictures and prompts; None for a default set.
        max_samples: most samples to run; None for all.
        state_file: statistics, kept so that a stopped calibration goes on where it was.
        keep_float: file of patterns of modules that stay in float.
        accuracy_budget: most next tokens, in percent, whose likeliest one may change; as many
            layers as that takes stay in float. None quantizes all that the recipe says.
        overwrite: whether an existing bundle is replaced.
    """

    bundle: Path
    target: Path
    recipe: RecipeOptions
    calibration: Path | None = None
    max_samples: int | None = None
    state_file: Path | None = None
    keep_float: Path | None = None
    accuracy_budget: float | None = None
    overwrite: bool = False


def quantize(options: QuantizeOptions, progress: Progress) -> QuantizeReport:
    """Quantizes or converts the graphs of a bundle and writes a new bundle.

    Everything is written to a temporary folder, which takes the target's name at the very end.

    Raises:
        BundleError: if the bundle is missing or damaged.
        CalibrationError: if it is quantized already, or the recipe or the data cannot be used.
    """
    started = time.monotonic()
    check_target(options.target, overwrite=options.overwrite, error=CalibrationError)
    manifest = load_manifest(options.bundle)
    verify_files(options.bundle, manifest, hashes=True)
    _check_is_float(options.bundle, manifest)
    recipe = _recipe(options, manifest)
    _check_half_cache(options.bundle, manifest, recipe)
    works = open_graphs(options.bundle, _files(manifest), recipe)
    probes = first_probes(works, recipe)
    is_asked = bool(probes) or options.accuracy_budget is not None
    job = _Job(options, manifest, recipe, _samples(options) if is_asked else ())
    with (
        new_bundle(options.target, error=CalibrationError) as folder,
        tempfile.TemporaryDirectory(
            prefix=f".{options.target.name}.", dir=options.target.parent
        ) as smoothed,
    ):
        source, works, statistics = _calibrated(job, works, probes, Path(smoothed), progress)
        budget = None
        if options.accuracy_budget is not None:
            formats, budget = keep_within_budget(
                source,
                job.files,
                recipe,
                works,
                statistics,
                job.samples,
                options.accuracy_budget,
                progress,
            )
            works = open_graphs(source, job.files, recipe, formats)
        graphs, target = _transformed(job, works, statistics, progress)
        (folder / _RECIPE_FILE).write_text(recipe_json(recipe), encoding="utf-8")
        (folder / _REPORT_FILE).write_text(report_json(graphs, budget), encoding="utf-8")
        models = {name: work.model for name, work in works.items()}
        written = write_bundle(folder, options.bundle, target, models, progress)
    return QuantizeReport(
        options.target, manifest, written, tuple(graphs), budget, time.monotonic() - started
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What stays the same from the first to the last step.

    Attributes:
        options: as the user gave them.
        manifest: of the float bundle.
        recipe: what becomes of it.
        samples: calibration data; none if nothing has to be known.
    """

    options: QuantizeOptions
    manifest: Manifest
    recipe: Recipe
    samples: Sequence[CalibrationSample]

    @property
    def files(self) -> dict[str, str]:
        """Graph name -> path in the bundle."""
        return _files(self.manifest)

    def collect(
        self,
        bundle: Path,
        probes: Mapping[str, Sequence[Probe]],
        suffix: str,
        progress: Progress,
    ) -> Statistics:
        """Statistics of a bundle's values; `suffix` tells state files of two passes apart."""
        if not probes:
            return {}
        state = self.options.state_file
        file = None if state is None else state.with_name(state.name + suffix)
        # The user's bundle was checked at the start, its smoothed form has just been written.
        options = CollectOptions(state_file=file, verify=False)
        return collect(bundle, probes, self.samples, options, progress)


def _calibrated(
    job: _Job,
    works: Mapping[str, GraphWork],
    probes: Mapping[str, Sequence[Probe]],
    smoothed: Path,
    progress: Progress,
) -> tuple[Path, dict[str, GraphWork], Statistics]:
    """Runs the data, and once more if channels were scaled, which changes distributions.

    Returns:
        The bundle that is to be quantized (the user's, or its smoothed form), its graphs, and
        statistics of their values.
    """
    source, files = job.options.bundle, job.files
    statistics = job.collect(source, probes, "", progress)
    works = without_outliers(works, statistics)
    if not smooth(works, statistics):
        return source, works, statistics
    # Weights that were scaled are read again from files, like all others.
    models = {name: work.model for name, work in works.items() if work.is_smoothed}
    write_bundle(smoothed, source, job.manifest, models, progress)
    formats = {name: work.formats for name, work in works.items()}
    works = open_graphs(smoothed, files, job.recipe, formats)
    second = job.collect(smoothed, second_probes(works), ".smoothed", progress)
    return smoothed, works, _joined(statistics, second)


def _transformed(
    job: _Job, works: Mapping[str, GraphWork], statistics: Statistics, progress: Progress
) -> tuple[list[GraphReport], Manifest]:
    """Quantizes and converts the graphs in place; the manifest still lists the old files."""
    target = _target_manifest(job.manifest, job.recipe)
    progress.start("quantizing", sum(_float_bytes(work) for work in works.values()))
    graphs = [
        transform(
            work,
            statistics.get(name, {}),
            _ports(work, job.manifest, target),
            progress,
            half_cache=job.recipe.kv_cache == "fp16",
        )
        for name, work in works.items()
    ]
    progress.finish()
    return graphs, replace(target, quantization=_record(job, graphs))


def _samples(options: QuantizeOptions) -> Sequence[CalibrationSample]:
    if options.max_samples is not None and options.max_samples < 1:
        msg = f"samples: found {options.max_samples}; expected 1 or more"
        raise CalibrationError(msg)
    source = options.calibration
    samples = default_samples() if source is None else load_samples(source)
    return samples[: options.max_samples]


def _check_half_cache(bundle: Path, manifest: Manifest, recipe: Recipe) -> None:
    is_float32 = manifest.precision == "float32" and recipe.graph(DECODER).compute == "keep"
    if recipe.kv_cache != "keep" and not (is_float32 and manifest.kv_layout.dtype == "float32"):
        msg = (
            f"{bundle}: a cache of its own element type is for decoders that compute in float32; "
            "one in half precision has its cache in it already; leave --kv-cache out"
        )
        raise CalibrationError(msg)


def _check_is_float(bundle: Path, manifest: Manifest) -> None:
    quantization = manifest.quantization
    if quantization is not None and quantization.has_integer_layers:
        msg = (
            f"{bundle}: is quantized already ({quantization.name}); expected a bundle whose "
            "weights are floats; quantize the one that it was made from"
        )
        raise CalibrationError(msg)


def _recipe(options: QuantizeOptions, manifest: Manifest) -> Recipe:
    recipe = wanted_recipe(options.recipe, [graph.name for graph in manifest.graphs])
    if options.keep_float is None:
        return recipe
    works = open_graphs(options.bundle, _files(manifest), recipe)
    layers = {name: find_layers(work.model) for name, work in works.items()}
    return kept_in_float(recipe, read_patterns(options.keep_float), layers)


def _files(manifest: Manifest) -> dict[str, str]:
    return {graph.name: graph.file for graph in manifest.graphs}


def _float_bytes(work: GraphWork) -> int:
    layers = work.layers("int8", "int8-weight-only", "int4")
    return sum(layer.weight.const_value.nbytes for layer in layers if layer.weight.const_value)


def _joined(first: Statistics, second: Statistics) -> Statistics:
    """Of values that both passes saw, what the later one saw."""
    return {name: {**first[name], **second.get(name, {})} for name in first}


def _target_manifest(manifest: Manifest, recipe: Recipe) -> Manifest:
    """In half precision if every graph that hands something on is; the logits stay float32."""
    cache = manifest.kv_layout.dtype if recipe.kv_cache == "keep" else _PRECISIONS[recipe.kv_cache]
    passed_on = (*manifest.image_graphs, "embed_tokens", DECODER)
    computes = {recipe.graph(name).compute for name in passed_on}
    precision = manifest.precision
    if len(computes) == 1 and computes != {"keep"}:
        cache = precision = _PRECISIONS[computes.pop()]
    return replace(
        manifest, precision=precision, kv_layout=replace(manifest.kv_layout, dtype=cache)
    )


def _ports(work: GraphWork, manifest: Manifest, target: Manifest) -> Collection[str]:
    """Ports that stay as they are: all, unless every graph takes the bundle's new precision."""
    if target.precision != manifest.precision:
        return float32_ports(manifest.graphs)
    graph = work.model.graph
    return {value.name or "" for value in (*graph.inputs, *graph.outputs)}


def _record(job: _Job, graphs: Sequence[GraphReport]) -> Quantization:
    source = ""
    if job.samples:
        data = job.options.calibration
        source = "a default set" if data is None else data.name
    return Quantization(
        name=job.options.recipe.name,
        graphs=tuple(
            QuantizedGraph(
                graph.graph, _PRECISIONS.get(graph.compute, job.manifest.precision), graph.counts
            )
            for graph in graphs
        ),
        recipe=_RECIPE_FILE,
        report=_REPORT_FILE,
        calibration=source,
        samples=len(job.samples),
    )
