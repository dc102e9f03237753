"""Element types of the values of a graph, and which nodes only move elements about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vlmport.errors import GraphError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MOVES", "float_inputs", "float_outputs", "infer_types", "is_float32", "moved_inputs"]

# What they give out is among what they take in: nothing is rounded and no magnitude grows.
MOVES = frozenset(
    {
        "Concat",
        "Expand",
        "Gather",
        "GatherElements",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "TensorScatter",
        "Transpose",
        "Unsqueeze",
    }
)


def infer_types(model: ir.Model) -> None:
    """Gives every value that a node makes an element type, which fusions leave open.

    Raises:
        GraphError: if one stays unknown, or a node holds a graph of its own.
    """
    ShapeInferencePass()(model)
    for node in model.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attrs(node)):
            msg = (
                f"{node.op_type} {node.name!r}: holds a graph of its own; expected plain nodes, "
                "which are all that an export writes"
            )
            raise GraphError(msg)
        for value in node.outputs:
            if value.dtype is None:
                msg = (
                    f"{node.op_type} {node.name!r}: its output {value.name!r} has no element type; "
                    "expected one on every value; export the bundle again"
                )
                raise GraphError(msg)


def is_float32(value: ir.Value | None) -> bool:
    """Whether a value is there and float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def float_inputs(node: ir.Node) -> list[ir.Value]:
    """Its float32 inputs, in order."""
    return [value for value in node.inputs if value is not None and is_float32(value)]


def float_outputs(node: ir.Node) -> list[ir.Value]:
    """Its float32 outputs, in order."""
    return [value for value in node.outputs if is_float32(value)]


def moved_inputs(node: ir.Node) -> list[ir.Value]:
    """The float32 values whose elements a moving node gives out; none for another node."""
    if node.op_type not in MOVES or node.domain:
        return []
    if node.op_type in {"Concat", "TensorScatter"}:
        return float_inputs(node)
    return float_inputs(node)[:1]


def _attrs(node: ir.Node) -> Iterable[ir.Attr]:
    return node.attributes.values()
