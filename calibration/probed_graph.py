"""Copies of graphs that give out inner values, with the names by which people know these."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.calibration.layers import find_layers
from vlmport.errors import CalibrationError, close_matches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.calibration.statistics import Probe

__all__ = ["ProbedGraph", "ProbedValue", "probed_graph"]

# What torch.onnx records of the modules around a node, outermost first, the node's own name last.
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True)
class ProbedValue:
    """A value that a graph gives out.

    Attributes:
        probe: what is to be collected of it.
        words: for messages: graph, PyTorch module and name.
        is_input: whether it is an input of the graph.
        shape: fixed length, name of a dynamic axis, or None for each axis; None if the rank is not
            known before the graph runs.
        channels: length of the channels' axis, None if it is not known before the graph runs.
    """

    probe: Probe
    words: str
    is_input: bool
    shape: tuple[int | str | None, ...] | None
    channels: int | None

    def valid_positions(
        self, shape: tuple[int, ...], patch_mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_] | None:
        """Which positions of a computed value hold patches of the picture, not padding.

        An axis of patches is one of a length that the graph does not fix, as long as the mask, or
        longer by the fixed count that its symbolic length tells: what a graph appends to patches
        stands behind them.

        Args:
            shape: of the value.
            patch_mask: bool [num_tiles, num_patches], False where a tile is padded.

        Returns:
            bool of the value's shape without the channels' axis; None if all count.
        """
        if patch_mask.all() or len(shape) < 3 or shape[0] != len(patch_mask):
            return None
        if self.probe.channel_axis == 1:
            return _pixels(patch_mask, shape[2:])
        for axis in range(1, len(shape) - 1):
            symbol = self.shape[axis] if self.shape else None
            added = re.search(r"\+ (\d+)$", str(symbol))
            appended = int(added[1]) if added else 0
            if isinstance(symbol, int) or shape[axis] != patch_mask.shape[1] + appended:
                continue
            longer = np.pad(patch_mask, ((0, 0), (0, appended)), constant_values=True)
            ones = [1] * len(shape[:-1])
            ones[0], ones[axis] = longer.shape
            return np.broadcast_to(longer.reshape(ones), shape[:-1])
        return None


@dataclass(frozen=True, slots=True)
class ProbedGraph:
    """A graph that gives out inner values.

    Attributes:
        content: the serialized graph; its weights are those beside the original's file.
        values: what is probed, in the order of computation, so that the first value that is wrong
            is the one that a message names.
    """

    content: bytes
    values: tuple[ProbedValue, ...]

    def only(self, names: frozenset[str]) -> ProbedGraph:
        """The same with some of the values; the others are not asked for when the graph runs."""
        kept = tuple(value for value in self.values if value.probe.value in names)
        return ProbedGraph(self.content, kept)


def probed_graph(path: Path, graph: str, probes: Sequence[Probe]) -> ProbedGraph:
    """Adds outputs to an in-memory copy of a graph; weights are neither read nor written.

    Args:
        path: the .onnx file.
        graph: its name, for messages.
        probes: one a value.

    Raises:
        CalibrationError: if a probe names no value of the graph, a weight, a value that is not
            floating, or the cache.
    """
    model = ir.load(path)
    order = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    known = {value.name: value for value in order if value.name}
    words = _Words(graph, model)
    wanted = {probe.value: probe for probe in probes}
    for name in wanted:
        _check(graph, name, known)
    inputs = {value.name for value in model.graph.inputs}
    outputs = {value.name for value in model.graph.outputs}
    values = tuple(
        ProbedValue(
            probe=wanted[name],
            words=words.of(value),
            is_input=name in inputs,
            shape=_shape(value),
            channels=_channels(value, wanted[name], words),
        )
        for name, value in known.items()
        if name in wanted
    )
    for value in values:
        if not value.is_input and value.probe.value not in outputs:
            model.graph.outputs.append(known[value.probe.value])
    return ProbedGraph(ir.to_proto(model).SerializeToString(), values)


def _check(graph: str, name: str, known: Mapping[str, ir.Value]) -> None:
    value = known.get(name)
    if value is None:
        near = close_matches(name, known)
        near = near if len(near) < 400 else f"{near[:400]}..."
        msg = f"{graph}: a probe asks for {name!r}, a value that the graph does not compute; {near}"
        raise CalibrationError(msg)
    if value.dtype is not None and not value.dtype.is_floating_point():
        msg = f"{graph}: a probe asks for {name!r}, which is {value.dtype}; expected a float value"
        raise CalibrationError(msg)
    if any("capacity" in str(dim) for dim in _shape(value) or ()):
        msg = (
            f"{graph}: a probe asks for {name!r}, a cache with rows that nothing was written to; "
            "probe the value that is written into it"
        )
        raise CalibrationError(msg)


class _Words:
    """Names values by the layers that read them, or by the module that computes them."""

    def __init__(self, graph: str, model: ir.Model) -> None:
        self._graph = graph
        self.layers = {layer.activation.name: layer for layer in find_layers(model)}

    def of(self, value: ir.Value) -> str:
        layer = self.layers.get(value.name)
        if layer is not None:
            return f"{self._graph}, input of {layer.name} (value {value.name!r})"
        producer = value.producer()
        if producer is None:
            return f"{self._graph}, input {value.name!r}"
        module = _module(producer)
        return f"{self._graph}, value {value.name!r}" + (f" of {module}" if module else "")


def _module(node: ir.Node) -> str:
    """The innermost PyTorch module around a node; "" if none is recorded."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return next((scope for scope in reversed(scopes[:-1]) if scope), "")


def _shape(value: ir.Value) -> tuple[int | str | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def _channels(value: ir.Value, probe: Probe, words: _Words) -> int | None:
    shape = _shape(value)
    length = shape[probe.channel_axis] if shape else None
    if isinstance(length, int):
        return length
    layer = words.layers.get(value.name)
    return layer.in_channels if layer is not None else None


def _pixels(patch_mask: NDArray[np.bool_], size: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """A mask of patches as one of pixels [num_tiles, height, width]; patches lie row by row."""
    height, width = size[0], size[-1]
    side = math.isqrt(height * width // patch_mask.shape[1])
    if len(size) != 2 or side * side * patch_mask.shape[1] != height * width:
        return None
    grid = patch_mask.reshape(len(patch_mask), height // side, width // side)
    return grid.repeat(side, axis=1).repeat(side, axis=2)
