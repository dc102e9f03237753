"""Replaces a decomposed RMS normalization by one node."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from vlmport.graphs.fusion import FusionPass, MatchResult, make_rule

__all__ = ["FuseRmsNormPass"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class _RmsNorm:
    def __init__(self, *, scale_first: bool, has_casts: bool) -> None:
        self._scale_first = scale_first
        self._has_casts = has_casts

    def pattern(self, op: Any, x: Any, scale: Any, epsilon: Any) -> Any:
        wide = op.Cast(x, to=int(ir.DataType.FLOAT)) if self._has_casts else x
        mean_square = op.ReduceMean(op.Pow(wide, 2.0), [-1], keepdims=1)
        normalized = op.Mul(wide, op.Reciprocal(op.Sqrt(op.Add(mean_square, epsilon))))
        if self._has_casts:
            normalized = op.Cast(normalized)
        return op.Mul(scale, normalized) if self._scale_first else op.Mul(normalized, scale)

    def check(
        self, context: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any
    ) -> MatchResult:
        del context
        result = MatchResult()
        if epsilon.const_value is None or epsilon.const_value.size != 1:
            return result.fail("epsilon is not a scalar constant", epsilon)  # case 1
        if x.dtype not in _FLOATS:
            return result.fail(f"x has element type {x.dtype}", x)  # case 2
        if scale.shape is None or len(scale.shape) != 1:
            return result.fail("scale is not of the length of the last axis alone", scale)  # case 3
        if x.shape is None or x.shape[-1] != scale.shape[0]:
            return result.fail("scale is not of the length of the last axis of x", scale)  # case 3
        if scale.dtype != x.dtype:  # the product's other factor is of scale's type
            return result.fail(f"scale is {scale.dtype}, x is {x.dtype}", scale)  # case 4
        return result

    def rewrite(
        self, op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any
    ) -> ir.Value:
        assert epsilon.const_value is not None
        value: ir.Value = op.RMSNormalization(
            x,
            scale,
            axis=-1,
            epsilon=float(epsilon.const_value.numpy().reshape(())),
            stash_type=int(ir.DataType.FLOAT),
        )
        return value


class FuseRmsNormPass(FusionPass):
    """Replace the six nodes of an RMS normalization by one RMSNormalization.

        x -> Pow(2) -> ReduceMean(-1) -> Add(epsilon) -> Sqrt -> Reciprocal -> Mul(x) -> Mul(scale)
     => x -> RMSNormalization(scale, epsilon, axis=-1, stash_type=float32)

    In half precision transformers casts x to float32 first and back before the product with scale.
    That is what stash_type=float32 means, so both casts go into the node.

    Refuses when:
      1. epsilon is not a scalar constant;
      2. x is not float32, float16 or bfloat16;
      3. scale is not one axis of the length of the last axis of x;
      4. scale is of another type than x.
    An inner value with another reader is refused by the matcher itself.

    Source: https://onnx.ai/onnx/operators/onnx__RMSNormalization.html (opset 23).
    """

    rules = (
        make_rule("rms_norm_scale_first", _RmsNorm(scale_first=True, has_casts=False)),
        make_rule("rms_norm_scale_last", _RmsNorm(scale_first=False, has_casts=False)),
        make_rule("half_rms_norm_scale_first", _RmsNorm(scale_first=True, has_casts=True)),
        make_rule("half_rms_norm_scale_last", _RmsNorm(scale_first=False, has_casts=True)),
    )
