"""Finds the layers that make queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmport.calibration.layers import Layer

__all__ = ["feeds_attention"]

_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})


def feeds_attention(layer: Layer) -> bool:
    """Whether a layer's output reaches an Attention without another product on the way."""
    pending: list[ir.Value] = list(layer.node.outputs)
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for use in value.uses():
            if use.node.op_type == "Attention":
                return True
            if use.node.op_type not in _PRODUCTS:
                pending += use.node.outputs
    return False
