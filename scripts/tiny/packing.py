"""Packs several questions about one picture into one sequence.

Two forms. "Branches": every question is a continuation of its own, which sees the picture and
itself only, with positions restarting behind the picture; this is the single-question form, many
times for the price of one picture. "Turns": the questions follow each other as in a real
conversation, each seeing those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiny.family import Turn

__all__ = ["Packed", "pack"]

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch of packed sequences; the prefix is what all rows share: text, then the picture.

    Attributes:
        input_ids: int64 [batch, text_length], the ids behind the picture, padded on the right.
        labels: int64 [batch, text_length], the id each position has to predict, or IGNORED.
        position_ids: int64 [batch, prefix_length + text_length].
        allowed: bool [batch, 1, prefix_length + text_length, the same], True where a query may
            see a key.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    allowed: Tensor


def pack(rows: list[list[Turn]], prefix_length: int, pad_token_id: int, *, branch: bool) -> Packed:
    """Packs each row's turns into one sequence.

    Args:
        rows: the turns of each picture.
        prefix_length: tokens in front of the turns: prompt text and image tokens.
        pad_token_id: fills the ends of shorter rows; never a label, seen by no real token.
        branch: the form: True for branches, False for turns.
    """
    text_length = max(sum(len(turn.ids) for turn in turns) for turns in rows)
    input_ids = torch.full((len(rows), text_length), pad_token_id)
    labels = torch.full((len(rows), text_length), IGNORED)
    positions = torch.arange(prefix_length + text_length).repeat(len(rows), 1)
    owner = torch.zeros((len(rows), prefix_length + text_length), dtype=torch.int64)
    for row, turns in enumerate(rows):
        start = 0
        for number, turn in enumerate(turns):
            end = start + len(turn.ids)
            ids = torch.tensor(turn.ids)
            input_ids[row, start:end] = ids
            first = turn.answer_start
            labels[row, start + first - 1 : end - 1] = ids[first:]
            if branch:
                span = slice(prefix_length + start, prefix_length + end)
                owner[row, span] = number + 1
                positions[row, span] = torch.arange(prefix_length, prefix_length + len(turn.ids))
            start = end
    return Packed(input_ids, labels, positions, _allowed(owner))


def _allowed(owner: Tensor) -> Tensor:
    """Lets a token see earlier tokens of its own branch (owner) and of the prefix (owner 0)."""
    causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    shared = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    return (causal & shared)[:, None]
