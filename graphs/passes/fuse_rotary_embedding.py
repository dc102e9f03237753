"""Replaces the rotation of queries and keys by one node."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from vlmport.graphs.fusion import FusionPass, MatchResult, as_int, as_ints, make_rule

__all__ = ["FuseRotaryEmbeddingPass"]


class _RotateHalf:
    def pattern(
        self,
        op: Any,
        x: Any,
        cosine: Any,
        sine: Any,
        low_start: Any,
        low_end: Any,
        high_start: Any,
        high_end: Any,
        cosine_axes: Any,
        sine_axes: Any,
    ) -> Any:
        low = op.Slice(x, low_start, low_end, [3], [1])
        high = op.Slice(x, high_start, high_end, [3], [1])
        rotated = op.Concat(op.Neg(high), low, axis=-1)
        turned = op.Mul(rotated, op.Unsqueeze(sine, sine_axes))
        return op.Add(op.Mul(x, op.Unsqueeze(cosine, cosine_axes)), turned)

    def check(
        self,
        context: Any,
        x: ir.Value,
        cosine: ir.Value,
        sine: ir.Value,
        low_start: ir.Value,
        low_end: ir.Value,
        high_start: ir.Value,
        high_end: ir.Value,
        cosine_axes: ir.Value,
        sine_axes: ir.Value,
        **_: Any,
    ) -> MatchResult:
        del context
        result = MatchResult()
        length = _head_length(x)
        if length is None:
            return result.fail("x is not [batch, heads, sequence_length, fixed length]", x)  # 1
        half = length // 2
        ends = as_int(high_end)
        if (as_int(low_start), as_int(low_end), as_int(high_start)) != (0, half, half):
            return result.fail("x is not cut into two halves", x)  # case 2
        if ends is None or ends < 2 * half:
            return result.fail("x is not cut into two halves", x)  # case 2
        if as_ints(cosine_axes) != [1] or as_ints(sine_axes) != [1]:
            return result.fail("cosine and sine do not broadcast over the heads", cosine)  # case 3
        if _half_angles(cosine, "Cos") is None or _half_angles(sine, "Sin") is None:
            return result.fail("cosine or sine is not of twice the same angles", cosine)  # case 4
        if not x.dtype == cosine.dtype == sine.dtype:
            return result.fail("cosine and sine are of another type than x", cosine)  # case 6
        return result

    def rewrite(self, op: Any, x: ir.Value, cosine: ir.Value, sine: ir.Value, **_: Any) -> ir.Value:
        caches = [_half_table(op, cosine, "Cos"), _half_table(op, sine, "Sin")]
        value: ir.Value = op.RotaryEmbedding(x, *caches, interleaved=0)
        return value


class _PartialRotation:
    def pattern(self, op: Any, x: Any, end: Any, start: Any, stop: Any) -> Any:
        turned = op.RotaryEmbedding(
            op.Slice(x, [0], end, [3], [1]),
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["turned"],
        )
        return op.Concat(turned, op.Slice(x, start, stop, [3], [1]), axis=-1)

    def check(
        self, context: Any, x: ir.Value, end: ir.Value, start: ir.Value, stop: ir.Value, **_: Any
    ) -> MatchResult:
        del context
        result = MatchResult()
        length = _head_length(x)
        if length is None:
            return result.fail("x is not [batch, heads, sequence_length, fixed length]", x)  # 1
        cut, last = as_int(end), as_int(stop)
        if cut is None or cut != as_int(start) or last is None or last < length:
            return result.fail("the parts are not the first and the rest of x", x)  # case 5
        return result

    def rewrite(self, op: Any, x: ir.Value, end: ir.Value, turned: ir.Value, **_: Any) -> ir.Value:
        node = turned.producer()
        assert node is not None
        value: ir.Value = op.RotaryEmbedding(
            x, *node.inputs[1:3], interleaved=0, rotary_embedding_dim=as_int(end)
        )
        return value


class FuseRotaryEmbeddingPass(FusionPass):
    """Replace rotate-half by RotaryEmbedding, for the whole head or for its first part.

        x * cos(a, a) + concat(-x[half:], x[:half]) * sin(a, a)
     => RotaryEmbedding(x, cos(a), sin(a))
        concat(RotaryEmbedding(x[:part]), x[part:])
     => RotaryEmbedding(x, rotary_embedding_dim=part)

    A constant factor on cosine and sine (the attention scaling of some rope types) is kept, and so
    is the cast to half precision after them: angles, cosine and sine stay float32.

    Refuses when:
      1. x does not have four axes, the last of fixed length;
      2. the cut is not at the half;
      3. cosine and sine are not spread over the heads;
      4. they are not made of one table of angles repeated twice;
      5. the parts of a partial rotation do not make up x;
      6. cosine and sine are of another type than x.

    Source: https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html (opset 23).
    """

    rules = (
        # Queries and keys of all layers read the same cosine and sine.
        make_rule("rotate_half", _RotateHalf(), keeps_nodes=True),
        make_rule("partial_rotation", _PartialRotation()),
    )


def _head_length(x: ir.Value) -> int | None:
    """Length of the last of four axes, if it is fixed."""
    if x.shape is None or len(x.shape) != 4:
        return None
    length = x.shape[3]
    return length if isinstance(length, int) else None


def _half_angles(table: ir.Value, operator: str) -> tuple[ir.Value, ir.Value | None] | None:
    """(angles, factor) if the table is cast?(operator(concat(angles, angles)) * factor?)."""
    node, factor = table.producer(), None
    if node is not None and node.op_type == "Cast":
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is not None and node.op_type == "Mul":
        factor = node.inputs[1]
        if factor is None or factor.const_value is None or factor.const_value.size != 1:
            return None
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != operator or node.inputs[0] is None:
        return None
    concat = node.inputs[0].producer()
    if concat is None or concat.op_type != "Concat" or concat.attributes["axis"].as_int() != -1:
        return None
    if len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
        return None
    angles = concat.inputs[0]
    return None if angles is None else (angles, factor)


def _half_table(op: Any, table: ir.Value, operator: str) -> ir.Value:
    found = _half_angles(table, operator)
    assert found is not None
    angles, factor = found
    value: ir.Value = op.Cos(angles) if operator == "Cos" else op.Sin(angles)
    if factor is not None:
        value = op.Mul(value, factor)
    last = table.producer()
    assert last is not None
    if last.op_type == "Cast":
        value = op.Cast(value, to=last.attributes["to"].as_int())
    return value
