"""Packs questions about an example's images into sequences.

Three forms. "Branches": every question is a continuation of its own, which sees the prefix (prompt
text and images) and itself only, with positions restarting behind the prefix; this is the
single-question form, many times for the price of one picture. "Turns": the questions follow each
other as in a real conversation, each seeing those before it. "Alone": each question has a sequence
of its own, whose prefix and question see each other in both directions; only the answer is causal.
That takes longer, so branches, whose prefix does not see the question, come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny.family import TinyFamily, Turn

__all__ = ["IGNORED", "Packed", "embed", "pack", "pack_alone"]

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch of sequences, padded on the right.

    Attributes:
        input_ids: int64 [batch, sequence_length]; the image token's id stands for each image token.
        labels: int64 [batch, sequence_length], the id each position has to predict, or IGNORED.
        position_ids: int64 [batch, sequence_length].
        allowed: bool [batch, 1, sequence_length, sequence_length], True where a query may see a
            key.
        examples: for each sequence the index of its example.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    allowed: Tensor
    examples: list[int]


def pack(
    prefixes: Sequence[list[int]],
    rows: Sequence[list[Turn]],
    pad_token_id: int,
    *,
    branch: bool,
    both_ways: bool = False,
) -> Packed:
    """Packs each example's turns into one sequence.

    Args:
        prefixes: the ids in front of each example's turns.
        rows: the turns of each example.
        pad_token_id: fills the ends of shorter rows; never a label, seen by no real token.
        branch: the form: True for branches, False for turns.
        both_ways: whether prefix and question each see themselves in both directions; the prefix
            cannot see the questions, being shared by several.
    """
    packed = _blank(
        [
            len(prefix) + sum(len(turn.ids) for turn in turns)
            for prefix, turns in zip(prefixes, rows, strict=True)
        ],
        pad_token_id,
    )
    owner = torch.zeros_like(packed.input_ids)
    for row, (prefix, turns) in enumerate(zip(prefixes, rows, strict=True)):
        start = len(prefix)
        packed.input_ids[row, :start] = torch.tensor(prefix)
        for number, turn in enumerate(turns):
            end = start + len(turn.ids)
            _write(packed, row, start, turn)
            if both_ways:
                question = slice(start, start + turn.answer_start)
                packed.allowed[row, :, question, question] = True
            if branch:
                owner[row, start:end] = number + 1
                positions = torch.arange(len(prefix), len(prefix) + len(turn.ids))
                packed.position_ids[row, start:end] = positions
            start = end
        if both_ways:
            packed.allowed[row, :, :, : len(prefix)] = True
    shared = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    packed.allowed[:] &= shared[:, None]
    return packed


def pack_alone(
    prefixes: Sequence[list[int]], rows: Sequence[list[Turn]], pad_token_id: int
) -> Packed:
    """Gives each turn a sequence of its own whose prompt sees itself in both directions.

    Args:
        prefixes: the ids in front of each example's turns.
        rows: the turns of each example.
        pad_token_id: fills the ends of shorter rows; never a label, seen by no real token.
    """
    pairs = [(index, turn) for index, turns in enumerate(rows) for turn in turns]
    lengths = [len(prefixes[index]) + len(turn.ids) for index, turn in pairs]
    packed = _blank(lengths, pad_token_id)
    for row, (index, turn) in enumerate(pairs):
        start = len(prefixes[index])
        packed.input_ids[row, :start] = torch.tensor(prefixes[index])
        _write(packed, row, start, turn)
        packed.allowed[row, :, :, : start + turn.answer_start] = True
    packed.examples[:] = [index for index, _ in pairs]
    return packed


def embed(family: TinyFamily, input_ids: Tensor, image_tokens: Sequence[Tensor]) -> Tensor:
    """Returns float32 [batch, sequence_length, hidden_size] with image tokens in their places.

    Args:
        family: the model.
        input_ids: int64 [batch, sequence_length].
        image_tokens: float32 [num_image_tokens, hidden_size] for each sequence.
    """
    is_image = input_ids == family.image_token_id
    text = family.embed(input_ids.masked_fill(is_image, 0))
    return text.masked_scatter(is_image[..., None], torch.cat(list(image_tokens)))


def _blank(lengths: list[int], pad_token_id: int) -> Packed:
    batch, longest = len(lengths), max(lengths)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    return Packed(
        input_ids=torch.full((batch, longest), pad_token_id),
        labels=torch.full((batch, longest), IGNORED),
        position_ids=torch.arange(longest).repeat(batch, 1),
        allowed=causal.repeat(batch, 1, 1, 1),
        examples=list(range(batch)),
    )


def _write(packed: Packed, row: int, start: int, turn: Turn) -> None:
    end = start + len(turn.ids)
    ids = torch.tensor(turn.ids)
    packed.input_ids[row, start:end] = ids
    packed.labels[row, start + turn.answer_start - 1 : end - 1] = ids[turn.answer_start :]
