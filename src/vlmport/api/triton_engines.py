"""What a repository carries so that TensorRT's engines can be built where they will run."""

from __future__ import annotations

import hashlib
import os
import shutil
from typing import TYPE_CHECKING

from vlmport.api.build_options import build_options
from vlmport.api.triton_files import graph_files
from vlmport.graphs.engine_source import engine_source, selection_sources
from vlmport.runtime.engines.profiles import check_options, tiles_of_an_image
from vlmport.runtime.triton.graph_models import served_graphs
from vlmport.runtime.triton_build.step import StepGraph, save_step

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.api.triton_models import Layout
    from vlmport.contract import Manifest
    from vlmport.contract_engines import EngineSource

__all__ = ["write_engine_step"]

_SOURCE = "source"  # of a version's folder: what TensorRT is given


def write_engine_step(bundle: Path, manifest: Manifest, layout: Layout, repository: Path) -> None:
    """Writes the graphs as TensorRT takes them, and the file that says what becomes of each.

    Building them then needs neither onnx nor torch.

    Args:
        bundle: its files were verified.
        manifest: of the bundle.
        layout: of the repository.
        repository: folder with the models' folders and the bundle beside the main one.

    Raises:
        EngineError: if the options are out of range.
        GraphError: if a graph is not of the form that engines need.
    """
    slots = layout.serving.num_slots
    images = max(slots, tiles_of_an_image(manifest))
    options = build_options(manifest, "tensorrt", max_batch=slots, max_images=images)
    check_options(manifest, options)
    home = repository / layout.names.main / "1"
    sources = [
        engine_source(bundle / graph.file, graph.name, options.max_length)
        for graph in manifest.graphs
    ]
    sources += selection_sources(bundle, manifest.dimensions.vocab_size)
    graphs = [_write(bundle, manifest, layout, repository, source) for source in sources]
    save_step(home, options, tuple(graphs))


def _write(
    bundle: Path, manifest: Manifest, layout: Layout, repository: Path, source: EngineSource
) -> StepGraph:
    home = repository / layout.names.main / "1"
    is_served = source.graph in served_graphs(manifest)
    is_own = source.graph not in manifest.image_graphs or not layout.calls_image_models(manifest)
    version = repository / layout.names.of(source.graph) / "1"
    folder = (home if is_own else version) / _SOURCE
    folder.mkdir(exist_ok=True)
    model = folder / f"{source.graph}.onnx"
    model.write_bytes(source.model)
    if is_own:
        place = home / "bundle" / source.path.relative_to(bundle)
    else:
        place = model
        for name in source.weight_files:
            shutil.copyfile(source.path.parent / name, folder / name)
    return StepGraph(
        graph=source.graph,
        model=os.path.relpath(model, home),
        place=os.path.relpath(place, home),
        inputs=source.inputs,
        outputs=source.outputs,
        attention=source.attention,
        cache_updates=source.cache_updates,
        weight_files=source.weight_files,
        digest=_digest(manifest, source),
        version_folder=os.path.relpath(version, home) if is_served else "",
        is_own=is_own,
    )


def _digest(manifest: Manifest, source: EngineSource) -> str:
    """Of the graph and its weights, whose digests the manifest has."""
    content = hashlib.sha256(source.model)
    if manifest.has_graph(source.graph):
        paths = graph_files(manifest, source.graph)
        digests = {entry.path: entry.sha256 for entry in manifest.files}
        content.update("".join(f"{path} {digests[path]}\n" for path in paths).encode())
    return content.hexdigest()
