"""Builds the engine of one graph that belongs to no bundle, with ranges for every axis."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from support.engine_builds import CAPACITY
from support.engine_graphs import one_profile

from vlmport.contract_engines import BuildOptions
from vlmport.graphs.engine_source import engine_source
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.builder import EngineBuilder
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.network import layers, parse_network
from vlmport.runtime.engines.progress import BuildWatch
from vlmport.runtime.engines.target import choose_target

if TYPE_CHECKING:
    from vlmport.contract_engines import Engine, EngineSource

__all__ = ["SingleEngine", "build_single"]

# Pixels of a side of a picture of any size, in patches.
_SIDE_PATCHES = (2, 4, 8)
_AXES = {
    "batch": (1, 2, 4),
    "num_images": (1, 2, 4),
    "num_masks": (1, 2, 4),
    "num_patches": (4, 16, 64),
    "num_tiles": (1, 2, 4),
}


@dataclass(frozen=True, slots=True)
class SingleEngine:
    """An engine that was built.

    Attributes:
        engine: what engine.json would say of it.
        layers: type of a layer of the parsed network -> how many there are.
    """

    engine: Engine
    layers: Counter[str]


def build_single(path: Path, capacity: int = CAPACITY) -> SingleEngine:
    """Parses and builds <graph>.onnx; its file is gone afterwards.

    Args:
        path: of the graph.
        capacity: rows of the cache.

    Raises:
        EngineError: if it does not parse or build, or would not compute what it means.
    """
    source = engine_source(path, path.stem, capacity)
    patch = _patch_side(source)
    sides = dict.fromkeys(("height", "width"), tuple(patch * count for count in _SIDE_PATCHES))
    axes = {**_AXES, **sides, "sequence_length": (1, 16, capacity)}
    profiles = one_profile(source, **axes)  # type: ignore[arg-type]  # three lengths each
    watch = BuildWatch(lambda _: None, threading.Event())
    with tempfile.TemporaryDirectory() as folder:
        engine, _ = _builder().build(source, profiles, Path(folder), watch)
    return SingleEngine(engine, _layers(source))


@functools.cache
def _builder() -> EngineBuilder:
    options = BuildOptions("tensorrt-rtx", 4, CAPACITY, CAPACITY, 4)
    bindings = load_bindings("tensorrt-rtx")
    return EngineBuilder(bindings, options, choose_target(bindings, options))


def _layers(source: EngineSource) -> Counter[str]:
    bindings = load_bindings("tensorrt-rtx")
    with listening() as log:
        logger = engine_logger(bindings)
        builder = bindings.Builder(logger)
        network, parser = parse_network(bindings, builder, source, log, logger)
        found = Counter(layer.type.name for layer in layers(network))
        del parser  # which holds the network's weights until here
    return found


def _patch_side(source: EngineSource) -> int:
    """The stride of the first convolution, in pixels; 1 for a graph without any."""
    for node in onnx.load_model_from_string(source.model).graph.node:
        for attribute in node.attribute:
            if node.op_type == "Conv" and attribute.name == "strides":
                return int(attribute.ints[0])
    return 1
