"""Writes a bundle in which some graphs of another one are replaced."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from vlmport.graphs.saving import save_model, weight_bytes
from vlmport.manifest import file_entry, save_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir

    from vlmport.api.progress import Progress
    from vlmport.contract import GraphSpec, Manifest, TensorSpec

__all__ = ["write_bundle"]


def write_bundle(
    folder: Path,
    source: Path,
    manifest: Manifest,
    models: Mapping[str, ir.Model],
    progress: Progress,
) -> Manifest:
    """Writes the graphs of `models`, and of `source` everything else.

    Args:
        folder: an empty folder, in which there may be further files for the manifest to list.
        source: the bundle that the graphs come from.
        manifest: of the new bundle; its graphs' ports, operators and sizes, and its files are
            found anew.
        models: graph name -> graph; their weights become external tensors of the new files.
        progress: is told of the bytes that are written.

    Returns:
        The manifest as it was written.

    Raises:
        OSError: if the disk is full or not writable.
    """
    replaced = {name for graph in manifest.graphs if graph.name in models for name in _files(graph)}
    for entry in manifest.files:
        if entry.path not in replaced and (source / entry.path).is_file():
            place = folder / entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            # No links: onnx-ir refuses weights in a file that has more than one.
            shutil.copyfile(source / entry.path, place)
    progress.start("writing weights", sum(weight_bytes(model) for model in models.values()))
    graphs = []
    for graph in manifest.graphs:
        model = models.get(graph.name)
        if model is None:
            graphs.append(graph)
            continue
        size = weight_bytes(model)
        save_model(model, folder / graph.file, progress.advance)
        graphs.append(_graph_spec(graph, model, size))
    progress.start("hashing")
    files = tuple(file_entry(folder, path) for path in sorted(_all_files(folder)))
    written = replace(manifest, graphs=tuple(graphs), files=files)
    save_manifest(folder, written)
    progress.finish()
    return written


def _files(graph: GraphSpec) -> tuple[str, str]:
    return graph.file, f"{graph.file}.data"


def _all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _graph_spec(spec: GraphSpec, model: ir.Model, parameter_bytes: int) -> GraphSpec:
    """The spec of a replaced graph: names and axes of its ports stay, types may not."""
    types = {
        value.name: value.dtype.numpy().name
        for value in (*model.graph.inputs, *model.graph.outputs)
        if value.dtype is not None
    }
    return replace(
        spec,
        inputs=tuple(_port(port, types) for port in spec.inputs),
        outputs=tuple(_port(port, types) for port in spec.outputs),
        operators=dict(sorted(Counter(node.op_type for node in model.graph).items())),
        opset=model.opset_imports[""],
        parameter_bytes=parameter_bytes,
    )


def _port(port: TensorSpec, types: Mapping[str | None, str]) -> TensorSpec:
    return replace(port, dtype=types[port.name])
