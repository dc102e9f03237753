"""Turns a graph in half precision into one that computes in float32 with the same weights."""

from __future__ import annotations

import onnx_ir as ir

from vlmport.errors import GraphError
from vlmport.graphs.passes.emulate_bfloat16 import widen_values_

__all__ = ["WidenHalfPass"]

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class WidenHalfPass(ir.passes.InPlacePass):
    """Computes every node in float32 and rounds nothing on the way.

        a -> MatMul(w) -> y, all float16 or bfloat16
     => a -> MatMul(Cast(w, float32)) -> y, a and y float32

    What the graph in half precision is off from it is rounding alone: the weights are the same,
    those that were rounded when the graph was written. Weights stay as they are in the file.

    Raises:
        GraphError: if the type of a node's output is not known, a node holds a graph of its own, or
            one still gives out half precision.

    Refuses when:
      1. nothing in the graph is in half precision.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether anything was in half precision."""
        results, modified = widen_values_(model, _HALF)
        _check_makers(results)
        return ir.passes.PassResult(model, modified)


def _check_makers(results: list[ir.Value]) -> None:
    """A node whose attribute holds a number in half precision makes half precision of it."""
    for value in results:
        node = value.producer()
        assert node is not None
        for attribute in node.attributes.values():
            is_tensor = attribute.type == ir.AttributeType.TENSOR
            if is_tensor and attribute.as_tensor().dtype in _HALF:
                msg = (
                    f"{node.op_type} {node.name!r}: its attribute {attribute.name} is in half "
                    "precision; expected weights and casts alone to be; export the bundle again"
                )
                raise GraphError(msg)
