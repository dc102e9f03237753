"""Makes a bfloat16 bundle run where no provider has bfloat16 kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.api.linked_bundle import link_file
from vlmport.graphs.passes.emulate_bfloat16 import EmulateBfloat16Pass
from vlmport.manifest import file_entry, load_manifest, save_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.contract import GraphSpec, Manifest, TensorSpec

__all__ = ["EMULATION", "emulated_bundle"]

# Told in every report on a bundle that ran this way.
EMULATION = "each bfloat16 operator computed in float32 and rounded"


def emulated_bundle(bundle: Path, target: Path) -> Manifest:
    """Writes a float32 bundle whose graphs round every result to bfloat16.

    Weights are not written again but linked, or copied where the file system has no links.

    Args:
        bundle: a bfloat16 bundle whose files are checked.
        target: an empty folder.

    Returns:
        The manifest of the written bundle.
    """
    manifest = load_manifest(bundle)
    graph_files = {graph.file for graph in manifest.graphs}
    for entry in manifest.files:
        source, place = bundle / entry.path, target / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry.path in graph_files:
            model = ir.load(source)
            EmulateBfloat16Pass()(model)
            ir.save(model, place)
        else:
            link_file(source, place)
    emulated = replace(
        manifest,
        precision="float32",
        kv_layout=replace(manifest.kv_layout, dtype="float32"),
        graphs=tuple(_as_float32(graph) for graph in manifest.graphs),
        files=tuple(
            file_entry(target, target / entry.path) if entry.path in graph_files else entry
            for entry in manifest.files
        ),
    )
    save_manifest(target, emulated)
    return emulated


def _as_float32(graph: GraphSpec) -> GraphSpec:
    return replace(
        graph,
        inputs=tuple(_port_as_float32(port) for port in graph.inputs),
        outputs=tuple(_port_as_float32(port) for port in graph.outputs),
    )


def _port_as_float32(port: TensorSpec) -> TensorSpec:
    return replace(port, dtype="float32") if port.dtype == "bfloat16" else port
