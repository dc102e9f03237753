"""Finds the nodes that a half-precision model of transformers computes in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vlmport.export.recipe import RECIPE_KEY
from vlmport.graphs.value_types import float_inputs, float_outputs

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RegionReason", "float32_regions", "is_parameter"]

RegionReason = Literal["positions", "scale of a norm", "norm", "sum"]
_SUMS = frozenset({"CumSum", "ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"})
_QUANTIZERS = frozenset({"DequantizeLinear", "QuantizeLinear"})


def float32_regions(model: ir.Model) -> dict[ir.Node, RegionReason]:
    """Node -> why it stays float32, in the order of the nodes.

      1. "positions": what is computed from integers and constants alone (rotary angles and their
         cosines and sines, fractions of a picture's side), and not from an activation or a
         parameter. transformers casts it where it meets the activations.
      2. "scale of a norm": a normalization whose scale is computed, as 1 + weight is, and that
         computation. transformers multiplies it in float32 and casts afterwards, where a plain
         weight is multiplied in half precision.
      3. "norm": a normalization in its parts: x^2, the mean, the root, and its product with x.
      4. "sum": any other sum or mean over an axis, whose result needs more digits than its terms.

    RMSNormalization and LayerNormalization with a plain weight are not among them: their
    stash_type is float32 already.

    Args:
        model: a float32 graph, every value with an element type.
    """
    found: dict[ir.Node, RegionReason] = {}
    for node in model.graph:
        if _is_from_integers(node, found):
            found[node] = "positions"
        if node.op_type == "RMSNormalization":
            scale = node.inputs[1]
            maker = None if scale is None else scale.producer()
            if maker is not None:
                found.update(dict.fromkeys((maker, node), "scale of a norm"))
        if node.op_type in _SUMS and float_outputs(node):
            chain = _norm(node)
            for part in chain:
                found.setdefault(part, "norm")
            found.setdefault(node, "sum")
    return {node: found[node] for node in model.graph if node in found}


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer is a weight of the checkpoint, not a constant of the graph."""
    return value.const_value is not None and RECIPE_KEY in value.const_value.metadata_props


def _is_from_integers(node: ir.Node, found: dict[ir.Node, RegionReason]) -> bool:
    values = (*float_inputs(node), *float_outputs(node))
    if not values or node.op_type in _QUANTIZERS:
        return False
    return all(_is_from_integers_value(value, found) for value in float_inputs(node))


def _is_from_integers_value(value: ir.Value, found: dict[ir.Node, RegionReason]) -> bool:
    if value.is_initializer():
        return not is_parameter(value)
    maker = value.producer()
    return maker is not None and found.get(maker) == "positions"


def _norm(mean: ir.Node) -> list[ir.Node]:
    """The parts of a normalization around its mean of squares; nothing if it is none."""
    squares = mean.inputs[0]
    square = None if squares is None else squares.producer()
    if square is None or square.op_type not in {"Mul", "Pow"}:
        return []
    source, parts, node = square.inputs[0], [square, mean], mean
    while len(uses := list(node.outputs[0].uses())) == 1:
        node = uses[0].node
        if node.op_type not in {"Add", "Div", "Mul", "Pow", "Reciprocal", "Sqrt"}:
            break
        parts.append(node)
        if source in node.inputs:
            return parts
    return []
