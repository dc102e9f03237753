"""Engines for the emulated TensorRT in a folder as `vlmport build` makes it, and a backend on them.

Ports, profiles and aliases are those of real engines; only the plans are not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from support.emulated_cuda import EmulatedCuda
from support.emulated_tensorrt import EmulatedTensorRT, plan_of
from tokenizers import Tokenizer

from vlmport.contract_engines import (
    ENGINES_SCHEMA_VERSION,
    BuildOptions,
    Engine,
    EngineSet,
)
from vlmport.engine_manifest import save_engine_set
from vlmport.graphs.engine_source import engine_source, selection_sources
from vlmport.manifest import graphs_digest, load_manifest
from vlmport.runtime import VisionLanguageModel
from vlmport.runtime.backends.tensorrt import TensorRTBackend
from vlmport.runtime.device.cuda import Cuda
from vlmport.runtime.engines.profiles import graph_profiles

if TYPE_CHECKING:
    from typing import Any

    from vlmport.contract import Manifest
    from vlmport.contract_engines import EnginePort, EngineSource
    from vlmport.runtime.preparation import ComputeFeatures

__all__ = ["VERSION", "EmulatedModel", "build_emulated", "default_options", "open_emulated"]

VERSION = "9.8.7"


def default_options(manifest: Manifest, **changes: Any) -> BuildOptions:
    """Small: ONNX Runtime's attention works over the whole capacity."""
    bidirectional = manifest.attention.prompt == "bidirectional"
    options = BuildOptions(
        backend="tensorrt-rtx",
        max_batch=4,
        max_length=256,
        prefill_chunk=256 if bidirectional else 32,
        max_images=5,
    )
    return replace(options, **changes)


def build_emulated(
    bundle: Path,
    folder: Path,
    options: BuildOptions,
    capability: str = "sm89",
    version: str = VERSION,
) -> EngineSet:
    """Writes engine.json and the plans."""
    manifest = load_manifest(bundle)
    folder.mkdir(parents=True)
    sources = [
        engine_source(bundle / graph.file, graph.name, options.max_length)
        for graph in manifest.graphs
    ]
    for source in selection_sources(folder, manifest.dimensions.vocab_size):
        source.path.write_bytes(source.model)
        sources.append(source)
    engines = tuple(_engine(source, manifest, options, folder, version) for source in sources)
    found = EngineSet(
        schema_version=ENGINES_SCHEMA_VERSION,
        version=version,
        capability=capability,
        device="Emulated GPU",
        graphs_sha256=graphs_digest(manifest),
        options=options,
        engines=engines,
        tools={},
    )
    save_engine_set(folder, found)
    return found


def _engine(
    source: EngineSource, manifest: Manifest, options: BuildOptions, folder: Path, version: str
) -> Engine:
    engine = Engine(
        graph=source.graph,
        file=f"{source.graph}.engine",
        size=0,
        sha256="",
        source_sha256="",
        inputs=source.inputs,
        outputs=tuple(_with_alias(port) for port in source.outputs),
        profiles=graph_profiles(manifest, source, options),
        attention=(),
        build_seconds=0.0,
        warnings=(),
    )
    plan = plan_of(engine, str(source.path), version)
    (folder / engine.file).write_bytes(plan)
    return replace(engine, size=len(plan), sha256=hashlib.sha256(plan).hexdigest())


def _with_alias(port: EnginePort) -> EnginePort:
    is_cache = port.name.startswith("present_key_values.")
    return replace(port, aliases=port.name.replace("present", "past", 1) if is_cache else "")


@dataclass(frozen=True, slots=True, eq=False)
class EmulatedModel:
    """A bundle that the real backend runs on the emulated GPU."""

    model: VisionLanguageModel
    backend: TensorRTBackend
    cuda: EmulatedCuda
    tensorrt: EmulatedTensorRT


def open_emulated(
    bundle: Path,
    engines: Path,
    *,
    memory: int = 1 << 30,
    captures: bool = True,
    capturable: bool = True,
    compute_features: ComputeFeatures | None = None,
) -> EmulatedModel:
    """Opens engines that `build_emulated` wrote; those of image graphs unless it is told how."""
    emulated = EmulatedCuda(memory, captures=captures)
    tensorrt = EmulatedTensorRT(emulated, VERSION, capturable=capturable)
    manifest = load_manifest(bundle)
    bindings: Any = tensorrt
    backend = TensorRTBackend(
        bundle,
        manifest,
        "tensorrt-rtx",
        engines,
        elsewhere=() if compute_features is None else manifest.image_graphs,
        cuda=Cuda(emulated),
        bindings=bindings,
    )
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    model = VisionLanguageModel(manifest, tokenizer, backend, compute_features)
    return EmulatedModel(model, backend, emulated, tensorrt)
