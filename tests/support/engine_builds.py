"""Builds and parses single graphs with TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vlmport.api.build_options import build_options
from vlmport.contract_engines import BuildOptions, Engine, EngineProfile, EngineSource
from vlmport.graphs.engine_source import engine_source
from vlmport.manifest import load_manifest
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.builder import EngineBuilder
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.network import layers, parse_network
from vlmport.runtime.engines.profiles import graph_profiles
from vlmport.runtime.engines.progress import BuildWatch
from vlmport.runtime.engines.target import choose_target

__all__ = ["CAPACITY", "built", "built_source", "parsed_layers", "small_options"]

CAPACITY = 128  # rows of the cache


def small_options(bundle: Path) -> BuildOptions:
    """Little of everything, so that builds are short."""
    return build_options(load_manifest(bundle), "tensorrt-rtx", max_length=CAPACITY)


def parsed_layers(path: Path) -> Counter[str]:
    """Type of a layer of the parsed network -> how many there are."""
    bindings = load_bindings("tensorrt-rtx")
    with listening() as log:
        logger = engine_logger(bindings)
        builder = bindings.Builder(logger)
        source = engine_source(path, path.stem, CAPACITY)
        network, parser = parse_network(bindings, builder, source, log, logger)
        assert parser.num_errors == 0
        return Counter(layer.type.name for layer in layers(network))


@functools.cache
def _builder(masking: Literal["lengths", "mask"]) -> EngineBuilder:
    options = BuildOptions("tensorrt-rtx", 4, CAPACITY, CAPACITY, 4, masking=masking)
    bindings = load_bindings("tensorrt-rtx")
    return EngineBuilder(bindings, options, choose_target(bindings, options))


def built(path: Path, bundle: Path, masking: Literal["lengths", "mask"] = "lengths") -> Engine:
    """The engine of a graph, whose file is gone.

    Args:
        path: <graph>.onnx.
        bundle: the graph, or one of the same ports, is part of it.
        masking: as in `BuildOptions`.
    """
    source = engine_source(path, path.stem, CAPACITY)
    profiles = graph_profiles(load_manifest(bundle), source, small_options(bundle))
    return built_source(source, profiles, masking)


def built_source(
    source: EngineSource,
    profiles: Sequence[EngineProfile],
    masking: Literal["lengths", "mask"] = "lengths",
) -> Engine:
    """The engine of a graph with profiles of its own, whose file is gone."""
    watch = BuildWatch(lambda _: None, threading.Event())
    with tempfile.TemporaryDirectory() as folder:
        return _builder(masking).build(source, profiles, Path(folder), watch)[0]
