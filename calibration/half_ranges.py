"""Finds what half precision cannot hold of a graph: values, weights and scores of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlmport.calibration.statistics import Probe
from vlmport.graphs.half_tensors import HALF_LIMITS, magnitudes
from vlmport.graphs.value_types import (
    float_inputs,
    float_outputs,
    infer_types,
    is_float32,
    moved_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from vlmport.calibration.statistics import GraphStatistics, ValueStatistics
    from vlmport.graphs.half_tensors import HalfType

__all__ = ["HEADROOM", "Finding", "RangeReason", "find_ranges", "find_weights", "half_probes"]

RangeReason = Literal[
    "overflow", "vanishing", "scores overflow", "small divisor", "weight overflow", "small weight"
]
# Data that calibration has not seen may reach further. Twice is one bit of the exponent, and what
# a float32 sum that is rounded to half precision in between could be off by at most.
HEADROOM = 2.0
# A value whose largest element is this many steps of the subnormal range keeps 8 bits there, as
# many as bfloat16 has; a smaller one keeps fewer and would be flushed to zero in the end.
_STEPS = 2.0**8
# Position of the input whose elements are divided by, or whose logarithm is taken.
_DIVISORS = {"Div": 1, "Log": 0, "Reciprocal": 0}
# A small term of a sum that is not small itself is lost in the sum's own rounding.
_SUMS = frozenset({"Add", "Sub"})
_QUANTIZERS = frozenset({"DequantizeLinear", "QuantizeLinear"})


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """Why a node must stay float32.

    Attributes:
        node: the node.
        value: name of the value, or of the weight, that half precision cannot hold.
        largest: its largest magnitude; of scores, the bound on theirs.
        smallest: its smallest magnitude that is not 0.
        reason: what half precision would do to it.
    """

    node: ir.Node
    value: str
    largest: float
    smallest: float
    reason: RangeReason


def half_probes(model: ir.Model) -> tuple[Probe, ...]:
    """What must be known of a float32 graph before it becomes one of half precision.

    Every value that is computed or enters: its range. What nodes only move about has the range of
    what they move; a cache holds the keys and values that are written to it. Of the queries and
    keys of attention also each channel's range, which bounds their products.

    Args:
        model: the graph; its values get element types where they have none.
    """
    infer_types(model)
    channels = {
        str(value.name) for node in model.graph for value in _queries_and_keys(node) if value
    }
    names = [str(value.name) for value in model.graph.inputs if _is_probed_input(value)]
    for node in model.graph:
        made = [str(value.name) for value in float_outputs(node)]
        names.extend(name for name in made if name in channels or not moved_inputs(node))
    return tuple(Probe(name, channels=name in channels) for name in dict.fromkeys(names))


def find_ranges(
    model: ir.Model, dtype: HalfType, statistics: GraphStatistics
) -> tuple[Finding, ...]:
    """The nodes that make or read a value which half precision cannot hold.

    Args:
        model: a float32 graph, every value with an element type.
        dtype: the half-precision type; bfloat16 has the range of float32, so nothing is found.
        statistics: of the values of `half_probes`; one that is missing is not judged.
    """
    if dtype == "BFLOAT16":
        return ()
    found: list[Finding] = []
    unfit = _unfit_values(model, dtype, statistics)
    for node in model.graph:
        for value in (*float_outputs(node), *float_inputs(node)):
            if value in unfit:
                name, seen, reason = unfit[value]
                if node.op_type != "TensorScatter" or reason == "overflow":
                    found.append(Finding(node, name, seen.amax, seen.smallest_magnitude, reason))
                break
        found.extend(_divisor(node, dtype, statistics))
        found.extend(_scores(node, dtype, statistics))
    return tuple(found)


def find_weights(model: ir.Model, dtype: HalfType) -> tuple[Finding, ...]:
    """The nodes that read a weight beyond half precision's largest number, or all too small.

    Scales of quantized numbers are judged by the smallest one: it alone scales its block.
    """
    limits, found = HALF_LIMITS[dtype], []
    for node in model.graph:
        for value in float_inputs(node):
            if not value.is_initializer() or value.const_value is None:
                continue
            largest, smallest = magnitudes(value.const_value)
            name = str(value.name)
            if largest > limits.largest:
                found.append(Finding(node, name, largest, smallest, "weight overflow"))
            elif 0 < largest < _STEPS * limits.smallest and node.op_type not in _SUMS:
                found.append(Finding(node, name, largest, smallest, "small weight"))
            elif node.op_type in _QUANTIZERS and smallest < _STEPS * limits.smallest:
                found.append(Finding(node, name, largest, smallest, "small weight"))
                found.extend(
                    Finding(use.node, name, largest, smallest, "small weight")
                    for output in node.outputs
                    for use in output.uses()
                )
    return tuple(found)


def _unfit_values(
    model: ir.Model, dtype: HalfType, statistics: GraphStatistics
) -> dict[ir.Value, tuple[str, ValueStatistics, RangeReason]]:
    """Value -> the value that was seen to be unfit, which is itself or what it was moved from."""
    limits = HALF_LIMITS[dtype]
    unfit: dict[ir.Value, tuple[str, ValueStatistics, RangeReason]] = {}

    def judge(value: ir.Value) -> None:
        seen = statistics.get(str(value.name))
        if seen is None:
            return
        if not seen.amax <= limits.largest / HEADROOM:  # a NaN too
            unfit[value] = (str(value.name), seen, "overflow")
        elif 0 < seen.amax < _STEPS * limits.smallest:
            unfit[value] = (str(value.name), seen, "vanishing")

    for value in model.graph.inputs:
        judge(value)
    for node in model.graph:
        moved = [value for value in moved_inputs(node) if value in unfit]
        for value in float_outputs(node):
            if moved and (node.op_type != "TensorScatter" or unfit[moved[0]][2] == "overflow"):
                unfit[value] = unfit[moved[0]]
            elif not moved_inputs(node):
                judge(value)
    return unfit


def _divisor(node: ir.Node, dtype: HalfType, statistics: GraphStatistics) -> Iterator[Finding]:
    """A divisor that would be flushed to zero, or lose digits that its reciprocal needs."""
    if node.op_type not in _DIVISORS:
        return
    value = node.inputs[_DIVISORS[node.op_type]]
    seen = None if value is None else statistics.get(str(value.name))
    if value is None or seen is None or not is_float32(value):
        return
    if seen.smallest_magnitude < HALF_LIMITS[dtype].smallest_normal:
        reason: RangeReason = "small divisor"
        for end in (node, value.producer()):
            if end is not None and not moved_inputs(end):
                yield Finding(end, str(value.name), seen.amax, seen.smallest_magnitude, reason)


def _scores(node: ir.Node, dtype: HalfType, statistics: GraphStatistics) -> Iterator[Finding]:
    """Attention whose products of queries and keys may not be finite in half precision.

    |sum of q_c k_c| <= sum of max |q_c| max |k_c|, times the scale. ONNX Runtime stores the
    scores in the type of the queries: beyond float16 it answers NaN (measured, 1.31.1).
    """
    seen = [statistics.get(str(value.name)) for value in _queries_and_keys(node) if value]
    if len(seen) != 2 or seen[0] is None or seen[1] is None:
        return
    queries, keys = seen[0].channel_amax, seen[1].channel_amax
    if queries is None or keys is None:
        return
    assert node.inputs[0] is not None
    scale = node.attributes.get_float("scale", 1.0 / float(np.sqrt(queries.size)))
    bound = float(queries.astype(np.float64) @ keys.astype(np.float64)) * abs(scale)
    if not bound <= HALF_LIMITS[dtype].largest / HEADROOM:
        yield Finding(node, str(node.inputs[0].name), bound, 0.0, "scores overflow")


def _queries_and_keys(node: ir.Node) -> tuple[ir.Value | None, ...]:
    if node.op_type != "Attention" or node.domain:
        return ()
    keys = node.inputs[1]
    maker = None if keys is None else keys.producer()
    if maker is not None and maker.op_type == "TensorScatter":
        keys = maker.inputs[1]  # what is written to the cache
    return node.inputs[0], keys


def _is_probed_input(value: ir.Value) -> bool:
    is_past = any(use.node.op_type == "TensorScatter" and use.idx == 0 for use in value.uses())
    return is_float32(value) and not is_past
