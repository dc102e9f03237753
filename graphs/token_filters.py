"""Nodes for top-k, top-p, min-p and the draw, on a vocabulary laid out as a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmport.graphs.node_writer import NodeWriter

__all__ = ["VocabularyGrid", "first_id_at", "kept_weights"]

# exp(-104) is 0 in float32: what lies further below the highest cannot be drawn.
_RANGE = 104.0
# Each round looks at 8 thresholds at once and leaves an eighth of the range; 11 leave 1.2e-8.
# More at once cost memory (float32 [batch, 8, vocab_size] where a reduction is not fused, 64 MiB
# for 8 rows of 262144), fewer cost launches one after the other.
_THRESHOLDS = 8
_ROUNDS = 11


@dataclass(frozen=True, slots=True)
class VocabularyGrid:
    """The vocabulary in rows of about its square root, in the order of token ids.

    A sum up to a token is the sum of the rows before its own and of those before it in its row:
    about a thousand terms at 262144 in place of as many as there are tokens.

    Attributes:
        values: the divided logits float32 [batch, 1, rows, width], -inf behind the vocabulary; the
            second axis is where thresholds lie beside each other.
        rows: of the grid.
        width: tokens of a row.
    """

    values: ir.Value
    rows: int
    width: int

    @classmethod
    def of(cls, nodes: NodeWriter, values: ir.Value, vocab_size: int) -> VocabularyGrid:
        """Lays out values float32 [batch, vocab_size]."""
        width = math.isqrt(vocab_size - 1) + 1
        rows = -(-vocab_size // width)
        padding = np.array([0, 0, 0, rows * width - vocab_size], np.int64)
        padded = nodes.add("Pad", values, nodes.constant(padding), -np.inf)
        return cls(nodes.reshape(padded, -1, 1, rows, width), rows, width)


def kept_weights(
    nodes: NodeWriter, grid: VocabularyGrid, top_k: ir.Value, top_p: ir.Value, min_p: ir.Value
) -> ir.Value:
    """The probabilities of the kept tokens, in units of the highest one: 0 for all others.

    Args:
        nodes: gets the nodes.
        grid: of the divided logits.
        top_k: float32 [batch, 1]; 0 keeps all.
        top_p: float32 [batch, 1]; 1 keeps all.
        min_p: float32 [batch, 1]; 0 keeps all.

    Returns:
        float32 [batch, 1, rows, width].
    """
    top_k, top_p, min_p = (nodes.reshape(value, -1, 1, 1, 1) for value in (top_k, top_p, min_p))
    highest = nodes.reduce("ReduceMax", grid.values, 2, 3)
    weights = nodes.add("Exp", nodes.add("Sub", grid.values, highest))
    every = float(grid.rows * grid.width + 1)  # more than there are: all are kept
    count = nodes.add("Where", nodes.add("Greater", top_k, 0.0), top_k, every)
    lowest, _ = _border(nodes, grid, highest, 1.0, count)
    # Ties with the k-th stay, as in transformers.
    in_top_k = nodes.add("GreaterOrEqual", grid.values, lowest)
    weights = nodes.add("Where", in_top_k, weights, 0.0)
    weights = _nucleus(nodes, grid, highest, weights, top_p)
    return nodes.add("Where", nodes.add("GreaterOrEqual", weights, min_p), weights, 0.0)


def _nucleus(
    nodes: NodeWriter,
    grid: VocabularyGrid,
    highest: ir.Value,
    weights: ir.Value,
    top_p: ir.Value,
) -> ir.Value:
    """Weights of the tokens that stay: those above them have less than top_p.

    Of equal ones at the border as many stay as are needed, the lowest ids first: a bfloat16 model
    has hundreds of equal logits there.
    """
    total = nodes.reduce("ReduceSum", weights, 2, 3)
    is_on = nodes.add("Less", top_p, 1.0)
    wanted = nodes.add("Mul", nodes.add("Where", is_on, top_p, 2.0), total)
    lowest, beyond = _border(nodes, grid, highest, weights, wanted)
    above = nodes.add(
        "And",
        nodes.add("GreaterOrEqual", grid.values, beyond),
        nodes.add("Greater", beyond, lowest),  # else the highest logit is the border itself
    )
    inner = nodes.add("Where", above, weights, 0.0)
    rest = nodes.add("Sub", wanted, nodes.reduce("ReduceSum", inner, 2, 3))
    at_least = nodes.add("GreaterOrEqual", grid.values, lowest)
    border = nodes.add("Where", at_least, nodes.add("Sub", weights, inner), 0.0)
    rest = nodes.reshape(rest, -1, 1)
    last = first_id_at(nodes, grid, border, rest, reaches="GreaterOrEqual")
    ids = np.arange(grid.rows * grid.width, dtype=np.float32).reshape(grid.rows, grid.width)
    is_needed = nodes.add("LessOrEqual", nodes.constant(ids), nodes.reshape(last, -1, 1, 1, 1))
    return nodes.add("Add", inner, nodes.add("Where", is_needed, border, 0.0))


def _border(
    nodes: NodeWriter,
    grid: VocabularyGrid,
    highest: ir.Value,
    weights: ir.Value | float,
    wanted: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Searches the largest threshold at and above which there is enough weight.

    Args:
        nodes: gets the nodes.
        grid: of the divided logits.
        highest: the highest of them, float32 [batch, 1, 1, 1].
        weights: float32 [batch, 1, rows, width], or one for all.
        wanted: how much weight is enough, float32 [batch, 1, 1, 1].

    Returns:
        A threshold with enough and a higher one with too little, float32 [batch, 1, 1, 1]. Nothing
        but equal logits lies between them, or such as differ by less than 1.2e-8. Both are the
        highest logit if that has enough; the first is 104 below it if nothing has.
    """
    low, high = nodes.add("Sub", highest, _RANGE), highest
    steps = np.arange(_THRESHOLDS, dtype=np.float32).reshape(1, -1, 1, 1) / _THRESHOLDS
    for _ in range(_ROUNDS):
        # From the high end down, since high - 0 is exactly high; no rounding leaves the range.
        below = nodes.add("Mul", nodes.add("Sub", high, low), nodes.constant(steps))
        thresholds = nodes.add("Sub", high, below)
        is_above = nodes.add("GreaterOrEqual", grid.values, thresholds)
        found = nodes.reduce("ReduceSum", nodes.add("Where", is_above, weights, 0.0), 2, 3)
        is_enough = nodes.add("GreaterOrEqual", found, wanted)
        low, high = (
            nodes.reduce("ReduceMax", nodes.add("Where", is_enough, thresholds, low), 1),
            nodes.reduce("ReduceMin", nodes.add("Where", is_enough, high, thresholds), 1),
        )
    return low, high


def first_id_at(
    nodes: NodeWriter, grid: VocabularyGrid, weights: ir.Value, place: ir.Value, reaches: str
) -> ir.Value:
    """Where, in the order of token ids, the sum of weights comes to a place.

    Args:
        nodes: gets the nodes.
        grid: the weights' form.
        weights: float32 [batch, 1, rows, width], 0 or more.
        place: float32 [batch, 1], 0 or more.
        reaches: operator that compares a sum with the place, Greater or GreaterOrEqual.

    Returns:
        Token ids as float32 [batch, 1], always of a token with weight: the last one at which the
        sum grows if the place lies beyond the end. At least vocab_size if there is no weight.
    """
    weights = nodes.reshape(weights, -1, grid.rows, grid.width)
    sums = nodes.reduce("ReduceSum", weights, 2, keeps_axes=False)
    sums_through = _sums_through(nodes, sums, grid.rows)
    row = _first_at(nodes, sums, sums_through, place, reaches, grid.rows)
    rows = nodes.constant(np.arange(grid.rows, dtype=np.float32))
    is_before = nodes.add("Less", rows, row)
    before = nodes.reduce("ReduceMax", nodes.add("Where", is_before, sums_through, 0.0), 1)
    is_row = nodes.add("Equal", nodes.reshape(rows, -1, 1), nodes.reshape(row, -1, 1, 1))
    chosen = nodes.add("Where", is_row, weights, 0.0)
    chosen = nodes.reduce("ReduceSum", chosen, 1, keeps_axes=False)
    rest = nodes.add("Sub", place, before)
    through = _sums_through(nodes, chosen, grid.width)
    column = _first_at(nodes, chosen, through, rest, reaches, grid.width)
    return nodes.add("Add", nodes.add("Mul", row, float(grid.width)), column)


def _sums_through(nodes: NodeWriter, weights: ir.Value, length: int) -> ir.Value:
    """The sums of weights [batch, length] up to and with each place: none is below the one before.

    Each is a sum of its own over as many terms, so that equal ones round alike.
    """
    places = np.arange(length, dtype=np.float32)
    until = nodes.constant(places.reshape(1, -1, 1))
    is_before = nodes.add("LessOrEqual", nodes.constant(places), until)
    terms = nodes.add("Where", is_before, nodes.reshape(weights, -1, 1, length), 0.0)
    return nodes.reduce("ReduceSum", terms, 2, keeps_axes=False)


def _first_at(
    nodes: NodeWriter,
    weights: ir.Value,
    sums_through: ir.Value,
    place: ir.Value,
    reaches: str,
    length: int,
) -> ir.Value:
    """The first position with weight whose sum comes to the place or is whole: float32 [batch, 1].

    The length if there is none.
    """
    whole = nodes.reduce("ReduceMax", sums_through, 1)
    is_there = nodes.add(
        "Or",
        nodes.add(reaches, sums_through, place),
        nodes.add("GreaterOrEqual", sums_through, whole),
    )
    is_found = nodes.add("And", is_there, nodes.add("Greater", weights, 0.0))
    places = nodes.constant(np.arange(length, dtype=np.float32))
    return nodes.reduce("ReduceMin", nodes.add("Where", is_found, places, float(length)), 1)
