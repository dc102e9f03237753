"""How many tokens each slot of a cache holds, and what may be asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vlmport.contract import AttentionForm

__all__ = ["SlotLengths"]


class SlotLengths:
    """The sequences of a cache without their content. What it checks are faults of the caller.

    Args:
        num_slots: sequences at most.
        attention: whether a prompt may be cut.

    Attributes:
        filled: int64 [num_slots], tokens whose keys and values are there.
        reserved: int64 [num_slots], tokens that there must be room for: those, or a prompt that is
            still running. 0 in an empty slot.
    """

    def __init__(self, num_slots: int, attention: AttentionForm) -> None:
        self.filled = np.zeros(num_slots, np.int64)
        self.reserved = np.zeros(num_slots, np.int64)
        self._sees_whole_prompt = attention.prompt == "bidirectional"

    def check_slot(self, slot: int) -> None:
        """Checks an index."""
        assert 0 <= slot < len(self.filled), f"slot {slot} of {len(self.filled)}"

    def check_piece(self, slot: int, prompt: int, start: int, stop: int) -> None:
        """Checks a piece of a prompt.

        Args:
            slot: where it runs.
            prompt: tokens of the whole prompt.
            start: first token of the piece.
            stop: behind the last one.
        """
        self.check_slot(slot)
        assert 0 <= start < stop <= prompt, (start, stop, prompt)
        assert start <= self.filled[slot], f"slot {slot} lacks tokens in front of {start}"
        if self._sees_whole_prompt:
            assert stop == prompt, f"a prompt whose tokens all see each other is cut at {stop}"

    def check_step(self, count: int) -> None:
        """Checks that the first slots can be decoded."""
        assert 0 < count <= len(self.filled), count
        filled, reserved = self.filled[:count], self.reserved[:count]
        assert filled.all(), f"one of the first {count} slots is empty"
        assert (filled == reserved).all(), f"the prompt of one of the first {count} is cut short"

    def check_length(self, slot: int, length: int) -> None:
        """Checks that a slot's first tokens are there."""
        self.check_slot(slot)
        assert 0 < length <= self.filled[slot], (length, self.filled[slot])

    def put(self, slot: int, filled: int, reserved: int = 0) -> None:
        """Says what a slot holds from now on.

        Args:
            slot: its index.
            filled: tokens that are there; the slot is empty if both are 0.
            reserved: tokens that there must be room for, if those are more.
        """
        self.filled[slot] = filled
        self.reserved[slot] = max(filled, reserved)
