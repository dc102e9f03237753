"""Turns a checkpoint into a bundle."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import platform
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import vlmport
from vlmport.api.bundle_folder import check_target, new_bundle
from vlmport.contract import (
    SCHEMA_VERSION,
    GraphSpec,
    Manifest,
    ModelDimensions,
    Precision,
    SourceCheckpoint,
    TensorSpec,
)
from vlmport.errors import ExportError, close_matches
from vlmport.export.family import plan_checkpoint
from vlmport.export.mask_decoder import with_mask_decoder
from vlmport.export.precision import in_precision
from vlmport.export.stream import save_graph, weight_bytes
from vlmport.export.tracing import trace
from vlmport.export.wrappers.decoder import in_place_attention
from vlmport.graphs.pipeline import optimize
from vlmport.manifest import file_entry, save_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from vlmport.api.progress import Progress
    from vlmport.export.family import ExportPlan
    from vlmport.export.tracing import TracedModule

__all__ = ["ExportOptions", "ExportReport", "export", "traced_graph"]

# Lengths of the dynamic axes during a trace: all different and above one, so that the tracer
# assumes neither equality nor broadcasting.
_SAMPLE_LENGTHS = {
    "batch": 2,
    "sequence_length": 3,
    "num_tiles": 2,
    # At least two patches of any size that is used.
    "height": 197,
    "width": 241,
    "capacity": 7,
    "num_images": 2,
    "num_patches": 5,
    "num_masks": 2,
}
# New objects between two searches for unreachable cycles during a trace.
_COLLECT_AFTER = 100_000
_PRECISIONS: MappingProxyType[str, Precision] = MappingProxyType(
    {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
)
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE")
_TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "tokenizers")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export, and where to.

    Attributes:
        checkpoint: folder of the checkpoint.
        bundle: folder to write.
        max_length: most tokens of a sequence; None for what the model supports.
        overwrite: whether an existing bundle is replaced.
        family_file: Python file that defines one more family; it is run.
        mask_decoder: weights of the decoder of segmentation masks; None leaves the graph out.
        prompt_template: name of the prompt form; None for the one that follows from the
            checkpoint.
        precision: element type in which the graphs compute: "fp32", "fp16" or "bf16".
    """

    checkpoint: Path
    bundle: Path
    max_length: int | None = None
    overwrite: bool = False
    family_file: Path | None = None
    mask_decoder: Path | None = None
    prompt_template: str | None = None
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        bundle: the folder.
        manifest: its manifest.
        seconds: how long it took.
    """

    bundle: Path
    manifest: Manifest
    seconds: float


def export(options: ExportOptions, progress: Progress) -> ExportReport:
    """Exports a checkpoint of any known family.

    Everything is written to a temporary folder beside the bundle, which takes the bundle's name
    at the very end; whatever fails leaves nothing behind.

    Raises:
        CheckpointError: if the checkpoint cannot be used.
        ExportError: if the bundle's place is taken or not writable, an option does not fit, or
            the family file cannot be used.
    """
    started = time.monotonic()
    check_target(options.bundle, overwrite=options.overwrite, error=ExportError)
    progress.start("reading the checkpoint")
    family, plan = plan_checkpoint(options.checkpoint, options.family_file, options.prompt_template)
    plan = replace(plan, dimensions=_dimensions(plan, options.max_length))
    plan = in_precision(plan, _known_precision(options.precision))
    if options.mask_decoder is not None:
        plan = with_mask_decoder(plan, options.mask_decoder)
    models = [_traced(graph, progress) for graph in plan.graphs]
    progress.finish()
    with new_bundle(options.bundle, error=ExportError) as workspace:
        manifest = _write(workspace, options, family.name, plan, models, progress)
    return ExportReport(options.bundle, manifest, time.monotonic() - started)


def _dimensions(plan: ExportPlan, max_length: int | None) -> ModelDimensions:
    limit = plan.dimensions.max_length
    if max_length is None:
        return plan.dimensions
    if not 0 < max_length <= limit:
        msg = (
            f"max_length: found {max_length}; the model supports 1 to {limit} tokens; "
            "choose a length in that range"
        )
        raise ExportError(msg)
    return replace(plan.dimensions, max_length=max_length)


def traced_graph(graph: TracedModule) -> ir.Model:
    """Traces one graph of a plan and brings it into the bundle's form, weights still planned."""
    with in_place_attention(), _rare_collection():
        return optimize(trace(graph, _SAMPLE_LENGTHS))


def _known_precision(name: str) -> Precision:
    if name not in _PRECISIONS:
        msg = f"precision: found {name!r}; {close_matches(name, _PRECISIONS)}"
        raise ExportError(msg)
    return _PRECISIONS[name]


def _traced(graph: TracedModule, progress: Progress) -> ir.Model:
    progress.start(f"tracing {graph.name}")
    return traced_graph(graph)


@contextlib.contextmanager
def _rare_collection() -> Iterator[None]:
    """Lets Python look for unreachable cycles less often.

    A trace makes millions of small objects that stay alive: at the usual threshold of 700 the
    search took 15 % of the time of tracing 12 layers (25.0 s, then 20.8 s); the peak of resident
    memory rose from 544 to 551 MiB.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _write(
    folder: Path,
    options: ExportOptions,
    family: str,
    plan: ExportPlan,
    models: list[ir.Model],
    progress: Progress,
) -> Manifest:
    checkpoint = options.checkpoint
    progress.start("writing weights", sum(weight_bytes(model) for model in models))
    specs = []
    for graph, model in zip(plan.graphs, models, strict=True):
        size = weight_bytes(model)
        save_graph(model, folder / f"{graph.name}.onnx", plan.store, progress.advance)
        specs.append(_graph_spec(graph, model, size))
    progress.finish()
    plan.tokenizer.save(str(folder / "tokenizer.json"))
    for name in _LICENCES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    progress.start("hashing")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        family=family,
        variant=plan.variant,
        precision=_known_precision(options.precision),
        dimensions=plan.dimensions,
        graphs=tuple(specs),
        kv_layout=plan.kv_layout,
        attention=plan.attention,
        image=plan.image,
        prompt=plan.prompt,
        special_tokens=plan.special_tokens,
        generation=plan.generation,
        answers=plan.answers,
        source=SourceCheckpoint(
            checkpoint.resolve().name,
            plan.layout,
            tuple(file_entry(checkpoint, path) for path in plan.source_files),
            options.prompt_template or "",
        ),
        tools=_tool_versions(),
        files=tuple(file_entry(folder, path) for path in sorted(folder.iterdir())),
    )
    save_manifest(folder, manifest)
    progress.finish()
    return manifest


def _graph_spec(graph: TracedModule, model: ir.Model, parameter_bytes: int) -> GraphSpec:
    return GraphSpec(
        name=graph.name,
        file=f"{graph.name}.onnx",
        inputs=tuple(_tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in model.graph.outputs),
        opset=model.opset_imports[""],
        operators=dict(sorted(Counter(node.op_type for node in model.graph).items())),
        parameter_bytes=parameter_bytes,
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    assert value.name is not None
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)


def _tool_versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _TOOLS}
    return {"vlmport": vlmport.__version__, "python": platform.python_version(), **versions}
