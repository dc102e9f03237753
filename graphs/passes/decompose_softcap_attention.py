"""Takes attention with a soft cap apart into operators that every backend has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.graphs.constants import add_integers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["DecomposeSoftcapAttentionPass"]

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Positions of the inputs of Attention (opset 24).
_MASK, _PAST_KEY, _PAST_VALUE, _LENGTHS = 3, 4, 5, 6
# exp() of it less any score is 0 in float32; infinity would make a row without a key NaN.
_UNSEEN = float(np.finfo(np.float32).min)


class DecomposeSoftcapAttentionPass(ir.passes.InPlacePass):
    """Replaces an Attention with a soft cap by products and a softmax in float32.

        Attention(q, k, v, mask?, lengths?, softcap=c, scale=s, is_causal?) -> y
     => Reshape(q * 2^n, [batch, kv_heads, group * sequence_length, head_dim])
          -> MatMul(k transposed) -> Cast(float32) -> Reshape [batch, heads, sequence_length, keys]
          -> c * Tanh(x * s / (2^n * c)) -> Where(seen, x, lowest) -> Softmax -> Where(seen, x, 0)
          -> Cast -> Reshape -> MatMul(v) -> Reshape [batch, heads, sequence_length, head_dim] -> y

        seen = mask and key < lengths and key - query <= lengths - sequence_length

    For TensorRT, whose parser refuses the attribute. Heads that share keys become rows of one
    product, so that no key or value is copied for them. 2^n, the power of two next to s, is exact
    in half precision and keeps the product of queries and keys within its range; the rest of the
    scale joins the cap. ONNX Runtime's Attention has the cap before the mask, and zeros for a query
    that sees no key, as here (1.31, measured).

    Refuses when:
      1. the node has no soft cap;
      2. queries, keys or values are not of four axes with fixed heads and head_dim, or are not
         float32, float16 or bfloat16;
      3. past keys or values are inputs, or more than y is an output;
      4. the mask is not bool of four axes, or its last axis is another one than that of the keys;
      5. the precision of the softmax is given and is not float32.

    Source: https://onnx.ai/onnx/operators/onnx__Attention.html (opset 24).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether a node was taken apart."""
        count = 0
        for node in list(model.graph):
            form = _form(node) if node.op_type == "Attention" else None
            if form is not None:
                _Rewriter(model, node, form).rewrite()
                count += 1
        return ir.passes.PassResult(model, bool(count))


@dataclass(frozen=True, slots=True)
class _Form:
    """What a node computes.

    Attributes:
        softcap: limit of a score's magnitude.
        scale: of the product of query and key.
        causal: whether a query sees only keys up to its own place, the last query the last key.
        heads: of the queries.
        kv_heads: of keys and values.
        value_dim: length of a value.
    """

    softcap: float
    scale: float
    causal: bool
    heads: int
    kv_heads: int
    value_dim: int


def _form(node: ir.Node) -> _Form | None:
    softcap = node.attributes.get_float("softcap", 0.0)
    if not softcap > 0.0:  # case 1
        return None
    shapes = [_heads(value) for value in node.inputs[:3]]
    if any(shape is None for shape in shapes):  # case 2
        return None
    (heads, head_dim), (kv_heads, _), (_, value_dim) = (shape for shape in shapes if shape)
    has_past = any(_input(node, index) is not None for index in (_PAST_KEY, _PAST_VALUE))
    if has_past or any(output.name for output in node.outputs[1:]):  # case 3
        return None
    if not _mask_fits(_input(node, _MASK), node.inputs[1]):  # case 4
        return None
    if node.attributes.get_int("softmax_precision", ir.DataType.FLOAT) != ir.DataType.FLOAT:
        return None  # case 5
    scale = node.attributes.get_float("scale", head_dim**-0.5)
    causal = node.attributes.get_int("is_causal", 0) == 1
    return _Form(softcap, scale, causal, heads, kv_heads, value_dim)


def _heads(value: ir.Value | None) -> tuple[int, int] | None:
    """(heads, head_dim) of [batch, heads, length, head_dim]."""
    if value is None or value.shape is None or len(value.shape) != 4 or value.dtype not in _TYPES:
        return None
    heads, head_dim = value.shape[1], value.shape[3]
    return (heads, head_dim) if isinstance(heads, int) and isinstance(head_dim, int) else None


def _mask_fits(mask: ir.Value | None, key: ir.Value | None) -> bool:
    if mask is None:
        return True
    if mask.dtype != ir.DataType.BOOL or mask.shape is None or len(mask.shape) != 4:
        return False
    assert key is not None  # looked at before
    assert key.shape is not None
    return mask.shape[3] == key.shape[2]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


class _Rewriter:
    """Writes the nodes that take the place of one."""

    def __init__(self, model: ir.Model, node: ir.Node, form: _Form) -> None:
        self._model = model
        self._node = node
        self._form = form
        self._output = node.outputs[0]
        query, key, value = node.inputs[:3]
        assert query is not None
        assert key is not None
        assert value is not None
        assert query.dtype is not None
        self._query, self._key, self._value = query, key, value
        self._dtype = query.dtype
        self._made: list[ir.Node] = []

    def rewrite(self) -> None:
        weights = self._softmax(self._scores())
        if self._dtype != ir.DataType.FLOAT:
            weights = self._cast(weights, self._dtype)
        weights = self._rows_of_kv_heads(weights, last=0)
        mixed = self._add("MatMul", [weights, self._value], self._dtype)
        result = self._rows_of_heads(mixed, last=self._form.value_dim)
        name, shape = self._output.name, self._output.shape
        self._model.graph.insert_before(self._node, self._made)
        self._output.replace_all_uses_with(result, replace_graph_outputs=True)
        self._model.graph.remove(self._node, safe=True)
        result.name, result.shape = name, shape

    def _scores(self) -> ir.Value:
        """float32 [batch, heads, sequence_length, keys], capped."""
        form, dtype = self._form, self._dtype
        power = 2.0 ** round(math.log2(form.scale))
        exact = self._scalar("power", np.array(power, dtype.numpy()))
        query = self._add("Mul", [self._query, exact], dtype)
        query = self._rows_of_kv_heads(query, last=0)
        turned = self._add("Transpose", [self._key], dtype, perm=(0, 1, 3, 2))
        scores = self._rows_of_heads(self._add("MatMul", [query, turned], dtype), last=0)
        if dtype != ir.DataType.FLOAT:
            scores = self._cast(scores, ir.DataType.FLOAT)
        inner = self._scalar("inner", np.float32(form.scale / power / form.softcap))
        bounded = self._add("Tanh", [self._add("Mul", [scores, inner])])
        return self._add("Mul", [bounded, self._scalar("softcap", np.float32(form.softcap))])

    def _softmax(self, scores: ir.Value) -> ir.Value:
        seen = self._seen()
        if seen is None:
            return self._add("Softmax", [scores], axis=-1)
        unseen = self._scalar("unseen", np.float32(_UNSEEN))
        kept = self._add("Where", [seen, scores, unseen])
        weights = self._add("Softmax", [kept], axis=-1)
        return self._add("Where", [seen, weights, self._scalar("zero", np.float32(0))])

    def _seen(self) -> ir.Value | None:
        """Which keys each query sees, bool, to be broadcast to the scores; None for all."""
        lengths = _input(self._node, _LENGTHS)
        parts = [_input(self._node, _MASK)]
        if lengths is not None:
            axes = self._integers("batch_axes", [1, 2, 3])
            lengths = self._add("Unsqueeze", [lengths, axes], ir.DataType.INT64)
            keys = self._range(self._key)
            parts.append(self._add("Less", [keys, lengths], ir.DataType.BOOL))
        if self._form.causal:
            parts.append(self._causal(lengths))
        seen: ir.Value | None = None
        for part in (part for part in parts if part is not None):
            both = seen is not None
            seen = self._add("And", [seen, part], ir.DataType.BOOL) if both else part
        return seen

    def _causal(self, lengths: ir.Value | None) -> ir.Value:
        """The last query sees the last valid key; without lengths the first sees the first key."""
        integer = ir.DataType.INT64
        axis = self._integers("query_axis", [1])
        query = self._add("Unsqueeze", [self._range(self._query), axis], integer)
        last = query
        if lengths is not None:
            offset = self._add("Sub", [lengths, self._length(self._query)], integer)
            last = self._add("Add", [query, offset], integer)
        keys = self._range(self._key)
        return self._add("LessOrEqual", [keys, last], ir.DataType.BOOL)

    def _range(self, value: ir.Value) -> ir.Value:
        """int64 [length]: 0, 1, ... along axis 2."""
        end = self._add("Squeeze", [self._length(value)], ir.DataType.INT64)
        bounds = [self._scalar("first", np.int64(0)), end, self._scalar("step", np.int64(1))]
        return self._add("Range", bounds, ir.DataType.INT64)

    def _length(self, value: ir.Value) -> ir.Value:
        """int64 [1]: length of axis 2."""
        return self._add("Shape", [value], ir.DataType.INT64, start=2, end=3)

    def _rows_of_kv_heads(self, value: ir.Value, last: int) -> ir.Value:
        """[batch, heads, rows, last] -> [batch, kv_heads, group * rows, last]; 0 is "as it is"."""
        return self._reshape(value, "kv_heads", self._form.kv_heads, last)

    def _rows_of_heads(self, value: ir.Value, last: int) -> ir.Value:
        return self._reshape(value, "heads", self._form.heads, last)

    def _reshape(self, value: ir.Value, name: str, heads: int, last: int) -> ir.Value:
        # Also with a group of one: a backend drops it, and there is one form to test.
        lengths = self._integers(f"{name}.{last}", [0, heads, -1, last])
        return self._add("Reshape", [value, lengths], value.dtype)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self._add("Cast", [value], dtype, to=int(dtype))

    def _integers(self, name: str, values: Sequence[int]) -> ir.Value:
        full = f"{self._output.name}.{name}"
        known = self._model.graph.initializers.get(full)
        return add_integers(self._model, full, values) if known is None else known

    def _scalar(self, name: str, array: NDArray[np.generic] | np.generic) -> ir.Value:
        full = f"{self._output.name}.{name}"
        known = self._model.graph.initializers.get(full)
        if known is not None:
            return known
        tensor = ir.tensor(np.asarray(array), name=full)
        constant = ir.Value(
            name=full, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._model.graph.initializers.add(constant)
        return constant

    def _add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        **attributes: int | tuple[int, ...],
    ) -> ir.Value:
        place = f"{len(self._made)}.{operator}"
        node = ir.node(operator, inputs, attributes, name=f"{self._node.name}.{place}")
        node.metadata_props.update(self._node.metadata_props)
        result = node.outputs[0]
        result.name = f"{self._output.name}.{place}"
        result.type = None if dtype is None else ir.TensorType(dtype)
        self._made.append(node)
        return result
