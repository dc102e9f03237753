"""Makes attention in half precision take its softmax in float32."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["SoftmaxInFloat32Pass"]

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class SoftmaxInFloat32Pass(ir.passes.InPlacePass):
    """Names the precision of the softmax, which would else be that of the queries.

        Attention(q, k, v)   =>   Attention(q, k, v, softmax_precision=float32)

    transformers' attention functions take the softmax of half-precision scores in float32: eager
    attention by `softmax(dtype=float32)`, PyTorch's fused one inside its kernel.

    Refuses when:
      1. the queries are not of a half-precision type;
      2. the precision is named already.

    Source: https://onnx.ai/onnx/operators/onnx__Attention.html (opset 24).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether an attention was changed."""
        count = sum(_name_precision(node) for node in model.graph)
        return ir.passes.PassResult(model, bool(count))


def _name_precision(node: ir.Node) -> bool:
    query = node.inputs[0] if node.op_type == "Attention" else None
    if query is None or query.dtype not in _HALVES:  # case 1
        return False
    if "softmax_precision" in node.attributes:  # case 2
        return False
    node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", int(ir.DataType.FLOAT))
    return True
