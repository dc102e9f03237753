"""Graphs that choose the next token from logits, so that logits need not leave the device.

They follow the rules of `vlmport.runtime.sampling`, which docs/token-selection.md puts in words.
Both are of standard operators that ONNX Runtime runs and TensorRT builds. There is no sort and no
TopK (TensorRT's takes at most 3840 of the vocabulary), no matrix product (TF32 would round it) and
no CumSum (a parallel one may fall from one position to the next).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.contract_engines import SELECT_GREEDY, SELECT_SAMPLED
from vlmport.graphs.node_writer import NodeWriter
from vlmport.graphs.token_filters import VocabularyGrid, first_id_at, kept_weights

if TYPE_CHECKING:
    import onnx

__all__ = ["selection_graphs"]

_BOOL, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT64, ir.DataType.FLOAT
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


def selection_graphs(vocab_size: int) -> dict[str, onnx.ModelProto]:
    """The graphs `select_greedy` and `select_sampled`, by name.

    select_greedy has the inputs logits float32 [batch, vocab_size] and suppressed bool
    [vocab_size], and the outputs token_ids int64 [batch, 1] and faulty bool [batch, 1], True where
    the logits hold NaN or their highest is infinite. Of equal logits the lowest id is taken.

    select_sampled has also the inputs temperature, top_p, min_p, repetition_penalty,
    frequency_penalty, presence_penalty and uniform float32 [batch, 1], top_k int64 [batch, 1],
    counts float32 [batch, vocab_size] and seen bool [batch, vocab_size], and the outputs new_counts
    and new_seen, the chosen token included. A temperature of 0 is greedy.

    Args:
        vocab_size: length of the logits; up to 2**24, which float32 counts without a gap.
    """
    return {SELECT_GREEDY: _greedy(vocab_size), SELECT_SAMPLED: _sampled(vocab_size)}


def _greedy(vocab_size: int) -> onnx.ModelProto:
    nodes = NodeWriter()
    best = _best(nodes, nodes.input("logits", _FLOAT, ("batch", vocab_size)), vocab_size)
    row = ("batch", 1)
    token_ids = nodes.cast(best.token, _INT64)
    outputs = (("token_ids", token_ids, _INT64, row), ("faulty", best.faulty, _BOOL, row))
    return nodes.model(SELECT_GREEDY, outputs)


def _sampled(vocab_size: int) -> onnx.ModelProto:
    nodes = NodeWriter()
    whole, row = ("batch", vocab_size), ("batch", 1)
    logits = nodes.input("logits", _FLOAT, whole)
    counts, seen = nodes.input("counts", _FLOAT, whole), nodes.input("seen", _BOOL, whole)
    best = _best(nodes, _penalised(nodes, logits, counts, seen), vocab_size)
    temperature = nodes.input("temperature", _FLOAT, row)
    # Divided by a temperature near 0 the logits overflow; that distribution tends to the best one.
    is_greedy = nodes.add(
        "Or",
        nodes.add("Less", temperature, _SMALLEST_TEMPERATURE),
        nodes.add(
            "Greater", nodes.add("Abs", best.highest), nodes.add("Mul", temperature, _LARGEST)
        ),
    )
    divisor = nodes.add("Where", is_greedy, 1.0, temperature)
    grid = VocabularyGrid.of(nodes, nodes.add("Div", best.logits, divisor), vocab_size)
    top_k = nodes.cast(nodes.input("top_k", _INT64, row), _FLOAT)
    top_p, min_p = (nodes.input(name, _FLOAT, row) for name in ("top_p", "min_p"))
    weights = kept_weights(nodes, grid, top_k, top_p, min_p)
    total = nodes.reshape(nodes.reduce("ReduceSum", weights, 2, 3), -1, 1)
    place = nodes.add("Mul", nodes.input("uniform", _FLOAT, row), total)
    drawn = first_id_at(nodes, grid, weights, place, reaches="Greater")
    nothing = nodes.add("GreaterOrEqual", drawn, float(vocab_size))  # only among faulty logits
    token = nodes.add("Where", nodes.add("Or", is_greedy, nothing), best.token, drawn)
    is_token = nodes.add("Equal", nodes.constant(_ids(vocab_size)), token)
    new_counts = nodes.add("Add", counts, nodes.add("Where", is_token, 1.0, 0.0))
    outputs = (
        ("token_ids", nodes.cast(token, _INT64), _INT64, row),
        ("faulty", best.faulty, _BOOL, row),
        ("new_counts", new_counts, _FLOAT, whole),
        ("new_seen", nodes.add("Or", seen, is_token), _BOOL, whole),
    )
    return nodes.model(SELECT_SAMPLED, outputs)


@dataclass(frozen=True, slots=True)
class _Best:
    """The most likely token.

    Attributes:
        logits: float32 [batch, vocab_size], -inf at suppressed tokens.
        highest: float32 [batch, 1].
        token: the lowest id of the highest, float32 [batch, 1].
        faulty: bool [batch, 1].
    """

    logits: ir.Value
    highest: ir.Value
    token: ir.Value
    faulty: ir.Value


def _best(nodes: NodeWriter, logits: ir.Value, vocab_size: int) -> _Best:
    suppressed = nodes.input("suppressed", _BOOL, (vocab_size,))
    logits = nodes.add("Where", suppressed, -np.inf, logits)
    highest = nodes.reduce("ReduceMax", logits, 1)
    # ArgMax promises no order of equals on a device; the least id is also never outside the table.
    is_highest = nodes.add("Equal", logits, highest)
    ids = nodes.add("Where", is_highest, nodes.constant(_ids(vocab_size)), float(vocab_size - 1))
    # A maximum on a device passes NaN over, so all are looked at: a NaN is not below infinity.
    below = nodes.add("Less", logits, np.inf)
    overflow = nodes.reduce("ReduceMax", nodes.add("Where", below, 0.0, 1.0), 1)
    has_none = nodes.add("Not", nodes.add("Greater", highest, -np.inf))
    faulty = nodes.add("Or", nodes.add("Greater", overflow, 0.5), has_none)
    return _Best(logits, highest, nodes.reduce("ReduceMin", ids, 1), faulty)


def _penalised(nodes: NodeWriter, logits: ir.Value, counts: ir.Value, seen: ir.Value) -> ir.Value:
    """See `SamplingOptions` for the formulas."""
    repetition, frequency, presence = (
        nodes.input(f"{kind}_penalty", _FLOAT, ("batch", 1))
        for kind in ("repetition", "frequency", "presence")
    )
    is_negative = nodes.add("Less", logits, 0.0)
    multiplied, divided = nodes.add("Mul", logits, repetition), nodes.add("Div", logits, repetition)
    repeated = nodes.add("Where", is_negative, multiplied, divided)
    logits = nodes.add("Where", seen, repeated, logits)
    logits = nodes.add("Sub", logits, nodes.add("Mul", frequency, counts))
    is_present = nodes.add("Greater", counts, 0.0)
    return nodes.add("Sub", logits, nodes.add("Where", is_present, presence, 0.0))


def _ids(vocab_size: int) -> np.typing.NDArray[np.float32]:
    # Token ids as float32: exact, and every runtime has its reductions.
    return np.arange(vocab_size, dtype=np.float32)
