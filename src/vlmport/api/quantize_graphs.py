"""The graphs of a bundle on their way to lower precision, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.api.quantize_report import GraphReport
from vlmport.calibration.activation_int8 import quantize_activations_
from vlmport.calibration.attention_inputs import feeds_attention
from vlmport.calibration.half_cache import half_cache_
from vlmport.calibration.half_precision import half_precision_, half_probes
from vlmport.calibration.layers import find_layers
from vlmport.calibration.outliers import outlier_layers
from vlmport.calibration.recipe import GraphRecipe, layer_formats
from vlmport.calibration.smooth import smooth_
from vlmport.calibration.statistics import Probe
from vlmport.calibration.weight_only import quantize_weights_

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from vlmport.api.progress import Progress
    from vlmport.calibration.activation_int8 import ActivationRange
    from vlmport.calibration.layers import Layer
    from vlmport.calibration.recipe import LayerFormat, Recipe
    from vlmport.calibration.statistics import GraphStatistics, Statistics
    from vlmport.calibration.weight_only import QuantizedLayer

__all__ = [
    "DECODER",
    "GraphWork",
    "first_probes",
    "open_graphs",
    "quantize_layers",
    "second_probes",
    "smooth",
    "transform",
    "without_outliers",
]

DECODER = "decoder"
# Most heads attend to the first token from every later one, so that an error of its key or value
# is one of every token; in a second moment it is one position of hundreds. In SmolLM2-135M, INT4
# of q, k and v alone raised the perplexity by 12.8 %; with a weight of 100 by 2.0 %, of 1000 by
# 1.1 %. Weighted in other layers as well it did harm.
_FIRST_POSITION_WEIGHT = 1000.0


@dataclass(frozen=True, slots=True, eq=False)
class GraphWork:
    """One graph that a recipe changes.

    Attributes:
        recipe: what becomes of it.
        model: the graph; `smooth` and `transform` change it in place.
        formats: layer name -> format.
    """

    recipe: GraphRecipe
    model: ir.Model
    formats: Mapping[str, LayerFormat]

    def layers(self, *formats: LayerFormat) -> list[Layer]:
        """The layers that have one of these formats, as the graph is now."""
        return [layer for layer in find_layers(self.model) if self.formats[layer.name] in formats]

    @property
    def is_smoothed(self) -> bool:
        """Whether channels are scaled before activations are quantized."""
        return self.recipe.activations.smoothing is not None and "int8" in self.formats.values()


def open_graphs(
    bundle: Path,
    files: Mapping[str, str],
    recipe: Recipe,
    formats: Mapping[str, Mapping[str, LayerFormat]] | None = None,
    only: str | None = None,
) -> dict[str, GraphWork]:
    """Opens the graphs that the recipe changes; weights stay in their files.

    Args:
        bundle: folder of the bundle.
        files: graph name -> path in the bundle.
        recipe: names its graphs.
        formats: graph name -> formats of its layers, where they are settled already.
        only: one of the graphs; None for all.

    Raises:
        CalibrationError: if a rule of the recipe names no layer.
    """
    works = {}
    for part in _parts(recipe):
        if only not in (None, part.graph):
            continue
        model = ir.load(bundle / files[part.graph])
        known = (formats or {}).get(part.graph)
        works[part.graph] = GraphWork(
            part, model, layer_formats(part, find_layers(model)) if known is None else known
        )
    return works


def _parts(recipe: Recipe) -> tuple[GraphRecipe, ...]:
    """Of each graph that changes, the decoder for its cache among them."""
    if recipe.kv_cache == "keep" or any(part.graph == DECODER for part in recipe.graphs):
        return recipe.graphs
    return (*recipe.graphs, GraphRecipe(DECODER))


def first_probes(works: Mapping[str, GraphWork], recipe: Recipe) -> dict[str, list[Probe]]:
    """What has to be known before anything is changed, by graph.

    Ranges and distributions of what "int8" layers read, second moments for AWQ and GPTQ, ranges of
    all values for half precision.
    """
    wanted = {name: _first_probes(work) for name, work in works.items()}
    if recipe.kv_cache != "keep":
        wanted[DECODER] += half_probes(works[DECODER].model)
    return {name: probes for name, probes in wanted.items() if probes}


def second_probes(works: Mapping[str, GraphWork]) -> dict[str, list[Probe]]:
    """What has to be known of smoothed graphs: how the inputs of "int8" layers are distributed."""
    return {
        name: [_probe(layer, histogram=True) for layer in work.layers("int8")]
        for name, work in works.items()
        if work.is_smoothed
    }


def without_outliers(
    works: Mapping[str, GraphWork], statistics: Statistics
) -> dict[str, GraphWork]:
    """The same graphs; layers whose activations no INT8 range can hold become weight-only."""
    return {name: _without_outliers(work, statistics.get(name, {})) for name, work in works.items()}


def smooth(works: Mapping[str, GraphWork], statistics: Statistics) -> bool:
    """Smooths the graphs that ask for it; says whether any weight was changed."""
    changed = False
    for name, work in works.items():
        if work.is_smoothed:
            layers = find_layers(work.model)
            method = work.recipe.activations
            changed |= bool(smooth_(work.model, layers, work.formats, method, statistics[name]))
    return changed


def transform(
    work: GraphWork,
    statistics: GraphStatistics,
    float32_ports: Collection[str],
    progress: Progress,
    *,
    half_cache: bool = False,
) -> GraphReport:
    """Quantizes the weights and activations of a graph, then converts what is left.

    Args:
        work: the graph; its model is changed.
        statistics: of its values; of the smoothed graph if it was smoothed.
        float32_ports: inputs and outputs that stay float32 in a graph of half precision.
        progress: is told of the float bytes of quantized weights.
        half_cache: whether a float32 decoder's cache becomes float16.

    Raises:
        CalibrationError: if statistics are missing, or a weight cannot be quantized.
    """
    weights, activations = quantize_layers(work, statistics, progress)
    recipe, half = work.recipe, None
    if half_cache and recipe.graph == DECODER:
        half_cache_(work.model, statistics)
    if recipe.compute != "keep":
        half = half_precision_(work.model, recipe.compute, statistics, float32_ports)
    return GraphReport(recipe.graph, recipe.compute, dict(work.formats), weights, activations, half)


def quantize_layers(
    work: GraphWork, statistics: GraphStatistics, progress: Progress
) -> tuple[tuple[QuantizedLayer, ...], tuple[ActivationRange, ...]]:
    """Quantizes the layers of a graph in place, by their formats.

    Args:
        work: the graph; its model is changed.
        statistics: of its values; of the smoothed graph if it was smoothed.
        progress: is told of the float bytes of quantized weights.

    Returns:
        What became of layers with float activations, and of those with integer ones.
    """
    recipe, model, formats = work.recipe, work.model, work.formats
    weights = quantize_weights_(
        model, find_layers(model), formats, recipe.weights, statistics, progress.advance
    )
    activations = quantize_activations_(
        model, work.layers("int8"), formats, recipe.activations, statistics, progress.advance
    )
    return weights, activations


def _without_outliers(work: GraphWork, statistics: GraphStatistics) -> GraphWork:
    ratio = work.recipe.activations.outlier_ratio
    layers = work.layers("int8")
    if ratio is None or not layers:
        return work
    found: dict[str, LayerFormat] = dict.fromkeys(
        outlier_layers(layers, statistics, ratio), "int8-weight-only"
    )
    return replace(work, formats={**work.formats, **found})


def _first_probes(work: GraphWork) -> list[Probe]:
    probes = [_probe(layer, histogram=True) for layer in work.layers("int8")]
    method = work.recipe.weights
    if method.rounding != "nearest":
        probes += [_probe(layer, moment=True) for layer in work.layers("int4")]
    if method.int8_rounding != "nearest":
        probes += [_probe(layer, moment=True) for layer in work.layers("int8-weight-only")]
    if work.recipe.compute != "keep":
        probes += half_probes(work.model)
    return probes


def _probe(layer: Layer, *, histogram: bool = False, moment: bool = False) -> Probe:
    assert layer.activation.name is not None
    rests_on_first = moment and feeds_attention(layer)
    return Probe(
        layer.activation.name,
        1 if layer.operator == "Conv" else -1,
        histogram=histogram,
        second_moment=moment,
        first_position_weight=_FIRST_POSITION_WEIGHT if rests_on_first else 1.0,
    )
