"""How a scale of the output's channels passes an operator to its inputs, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from vlmport.graphs.fusion import as_ints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

__all__ = ["RULES", "UNSCALED", "Labels", "Lengths", "Move", "NoPathError", "known_lengths"]

# The label of elements that no scale reaches.
UNSCALED = -1
# For each element of a value the channel whose scale it takes, or UNSCALED: int64, of the value's
# rank, an axis along which all are alike having length 1.
Labels: TypeAlias = "NDArray[np.int64]"
# Of each axis: a number, a symbol, or None if nothing is known.
Lengths: TypeAlias = "Sequence[int | str | None]"


class NoPathError(Exception):
    """A scale cannot pass a node without changing what the graph computes; says which and why."""


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """An input that must be scaled for the output to be.

    Attributes:
        index: its place among the node's inputs.
        labels: of its elements.
        power: its scale is the output's to this power.
        shared: other labels of the same shape whose scales must be the same as of `labels`.
    """

    index: int
    labels: Labels
    power: float = 1.0
    shared: tuple[Labels, Labels] | None = None


def known_lengths(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """The lengths of a value's axes, or None if not even their number is known."""
    if value is None:
        return None
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None:
        return None
    return tuple(
        length if isinstance(length, int) else (None if length.value is None else str(length.value))
        for length in shape
    )


def _first(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del node, output
    return [Move(0, labels)]


def _add(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del node, output
    return [Move(0, labels), Move(1, labels)]


def _norm(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    if node.attributes.get_int("axis", -1) not in {-1, labels.ndim - 1}:
        raise NoPathError(f"{node.op_type} normalizes over several axes")
    weights = [index for index, value in enumerate(node.inputs) if index and value is not None]
    return [Move(index, labels) for index in weights]


def _product(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    columns = labels.reshape(-1)
    if labels.shape[-1] != columns.size:
        raise NoPathError(f"{node.op_type}: the scaled axis is not that of its weight")
    transposed = node.attributes.get_int("transB", 0) == 1
    moves = [Move(1, columns[:, None] if transposed else columns[None])]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        moves.append(Move(2, columns))
    return moves


def _pow(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    # (x / s ** (1 / n)) ** n = x ** n / s, for s > 0.
    power = node.inputs[1]
    if power is None or power.const_value is None or power.const_value.size != 1:
        raise NoPathError("Pow has an exponent that is no constant number")
    number = float(power.const_value.numpy().reshape(-1)[0])
    if number <= 0:
        raise NoPathError(f"Pow has the exponent {number}")
    return [Move(0, labels, 1 / number)]


def _transpose(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    return [Move(0, labels.transpose(np.argsort(node.attributes["perm"].as_ints())))]


def _split(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    axis = node.attributes.get_int("axis", 0) % labels.ndim
    sizes = as_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is None or sizes[output] != labels.shape[axis]:
        raise NoPathError("Split along an axis that is not wholly scaled")
    parts = [
        np.full([*labels.shape[:axis], size, *labels.shape[axis + 1 :]], UNSCALED) for size in sizes
    ]
    parts[output] = labels
    return [Move(0, np.concatenate(parts, axis=axis))]


def _unsqueeze(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    axes = as_ints(node.inputs[1])
    if axes is None:
        raise NoPathError("Unsqueeze at axes that are no constant")
    return [Move(0, labels.squeeze(tuple(axes)))]


def _squeeze(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    axes = as_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        raise NoPathError("Squeeze of axes that are no constant")
    return [Move(0, np.expand_dims(labels, tuple(axes)))]


def _gather_elements(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    return [Move(0, _along_others(node, labels, 0))]


def _concat(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    labels = _along_others(node, labels, 0)
    return [Move(index, labels) for index in range(len(node.inputs))]


def _tensor_scatter(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    labels = _along_others(node, labels, -2)
    return [Move(0, labels), Move(1, labels)]


def _along_others(node: ir.Node, labels: Labels, default: int) -> Labels:
    """The labels, if they do not change along the axis of the node."""
    if labels.shape[node.attributes.get_int("axis", default)] != 1:
        raise NoPathError(f"{node.op_type} along the channels")
    return labels


def _attention(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    values = known_lengths(node.inputs[2])
    if output or values is None or len(values) != 4 or labels.ndim != 4:
        raise NoPathError("Attention without an axis of heads")
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        raise NoPathError("Attention that joins past values")
    heads, query_heads = values[1], labels.shape[1]
    if not isinstance(heads, int) or query_heads % heads or labels.shape[2] != 1:
        raise NoPathError("Attention with an unknown number of heads")
    # Queries of consecutive heads read one head of values.
    grouped = labels.reshape(heads, query_heads // heads, labels.shape[3])
    shared = grouped, np.broadcast_to(grouped[:, :1], grouped.shape)
    return [Move(2, grouped[None, :, 0, None], shared=shared)]


def _expand(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    del output
    before = known_lengths(node.inputs[0])
    if before is None or len(before) != labels.ndim:
        raise NoPathError("Expand of a value of unknown shape")
    first = labels
    for axis, length in enumerate(before):
        if length == 1:
            first = first.take([0], axis)
    return [Move(0, first, shared=(labels, np.broadcast_to(first, labels.shape)))]


def _reshape(node: ir.Node, output: int, labels: Labels) -> list[Move]:
    before, after = known_lengths(node.inputs[0]), known_lengths(node.outputs[output])
    asked = as_ints(node.inputs[1])
    if after is None and asked is not None and before is not None:
        keeps = not node.attributes.get_int("allowzero", 0)
        after = tuple(
            before[axis] if length == 0 and keeps else None if length == -1 else length
            for axis, length in enumerate(asked)
        )
    if before is None or after is None or len(after) != labels.ndim:
        raise NoPathError("Reshape of a value of unknown shape")
    return [Move(0, _reshaped(labels, before, after))]


def _reshaped(labels: Labels, before: Lengths, after: Lengths) -> Labels:
    """Labels of a reshape's input; axes are matched from the last, known lengths by product."""
    old, new, lengths = len(before), len(after), list[int]()
    while old and new:
        if before[old - 1] is not None and before[old - 1] == after[new - 1]:
            old, new = old - 1, new - 1
            lengths.insert(0, labels.shape[new])
            continue
        block = _equal_products(before[:old], after[:new])
        if block is None:
            break
        outer, inner = after[block[1] : new], before[block[0] : old]
        held = labels.shape[block[1] : new]
        if held != tuple(outer) and any(length != 1 for length in held):
            raise NoPathError("Reshape joins the channels with another axis")
        spread = held == tuple(outer)
        lengths = [*(int(str(length)) if spread else 1 for length in inner), *lengths]
        old, new = block
    if any(length != 1 for length in labels.shape[:new]):
        raise NoPathError("Reshape moves the channels over axes of unknown length")
    return labels.reshape([1] * old + lengths)


def _equal_products(before: Lengths, after: Lengths) -> tuple[int, int] | None:
    """Where the shortest tails of known lengths with the same product begin."""
    starts, products = [len(before), len(after)], [1, 1]
    while products[0] != products[1] or products[0] == 1:
        side = 0 if products[0] <= products[1] else 1
        if starts[side] == 0:
            return None
        starts[side] -= 1
        length = (before, after)[side][starts[side]]
        if not isinstance(length, int):
            return None
        products[side] *= length
    return starts[0], starts[1]


# Operator -> rule(node, place of the scaled output, its labels). Mul leaves a choice and has none.
RULES: Mapping[str, Callable[[ir.Node, int, Labels], list[Move]]] = {
    "Add": _add,
    "Attention": _attention,
    "Cast": _first,
    "Concat": _concat,
    "Expand": _expand,
    "GatherElements": _gather_elements,
    "Gemm": _product,
    "Identity": _first,
    "LayerNormalization": _norm,
    "MatMul": _product,
    "Pow": _pow,
    "RMSNormalization": _norm,
    # relu(x / s) = relu(x) / s, for s > 0.
    "Relu": _first,
    "Reshape": _reshape,
    "Split": _split,
    "Squeeze": _squeeze,
    "TensorScatter": _tensor_scatter,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
