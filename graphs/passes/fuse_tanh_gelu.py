"""Replaces a decomposed tanh approximation of GELU by one node."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from vlmport.graphs.fusion import FusionPass, MatchResult, make_rule

__all__ = ["FuseTanhGeluPass"]


class _TanhGelu:
    def pattern(self, op: Any, x: Any, half: Any, cubic: Any, root: Any, one: Any) -> Any:
        inner = op.Add(x, op.Mul(op.Pow(x, 3.0), cubic))
        gate = op.Add(op.Tanh(op.Mul(inner, root)), one)
        return op.Mul(op.Mul(x, half), gate)

    def check(
        self,
        context: Any,
        half: ir.Value,
        cubic: ir.Value,
        root: ir.Value,
        one: ir.Value,
        **_: Any,
    ) -> MatchResult:
        del context
        result = MatchResult()
        factors = ((half, 0.5), (cubic, 0.044715), (root, math.sqrt(2.0 / math.pi)), (one, 1.0))
        for value, number in factors:
            found = value.const_value
            if found is None or found.size != 1:
                return result.fail("a factor is not a scalar constant", value)  # case 1
            # In half precision the factors are rounded as well.
            rounded = float(np.array(number, found.dtype.numpy()))
            if not math.isclose(float(found.numpy().reshape(())), rounded, rel_tol=1e-5):
                return result.fail(f"a factor is not {number:.6f}", value)  # case 2
        return result

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> ir.Value:
        value: ir.Value = op.Gelu(x, approximate="tanh")
        return value


class FuseTanhGeluPass(FusionPass):
    """Replace the eight nodes of transformers' gelu_new by one Gelu.

        0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))   =>   Gelu(x, approximate=tanh)

    In half precision one rounding takes the place of eight, and of three rounded factors.

    Refuses when:
      1. a factor is not a scalar constant;
      2. a factor is not the one of the approximation.

    Source: https://onnx.ai/onnx/operators/onnx__Gelu.html (opset 20).
    """

    rules = (make_rule("tanh_gelu", _TanhGelu()),)
