"""How many tokens each slot of a cache holds, and what may be asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import InputError

if TYPE_CHECKING:
    from vlmport.contract import AttentionForm

__all__ = ["SlotLengths"]


class SlotLengths:
    """The sequences of a `vlmport.runtime.backends.base.SlotDecoding`, without their content.

    Args:
        num_slots: sequences at most.
        max_length: tokens of one sequence at most.
        attention: whether a prompt may be cut.

    Attributes:
        filled: int64 [num_slots], tokens whose keys and values are there.
        reserved: int64 [num_slots], tokens that there must be room for: those, or a prompt that is
            still running.
    """

    def __init__(self, num_slots: int, max_length: int, attention: AttentionForm) -> None:
        self.filled = np.zeros(num_slots, np.int64)
        self.reserved = np.zeros(num_slots, np.int64)
        self.max_length = max_length
        self._sees_whole_prompt = attention.prompt == "bidirectional"

    def __len__(self) -> int:
        """Slots."""
        return len(self.filled)

    @property
    def used(self) -> int:
        """Slots up to the last one that holds a sequence."""
        occupied = np.flatnonzero(self.reserved)
        return int(occupied[-1]) + 1 if len(occupied) else 0

    def check_piece(self, slot: int, prompt: int, start: int, stop: int) -> None:
        """Checks a piece of a prompt; what is wrong here is a fault of the caller.

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
            whole = start in {0, prompt - 1} and stop == prompt
            assert whole, f"a prompt that sees itself both ways is cut at {start}, {stop}"

    def check_step(self, num_decoded: int) -> None:
        """Checks that the first slots can be decoded."""
        assert 0 < num_decoded <= len(self), num_decoded
        assert self.filled[:num_decoded].all(), "an empty slot is decoded"

    def check_length(self, slot: int, length: int) -> None:
        """Checks that a slot's first tokens are there."""
        self.check_slot(slot)
        assert 0 < length <= self.filled[slot], (length, self.filled[slot])

    def check_slot(self, slot: int) -> None:
        """Checks an index."""
        assert 0 <= slot < len(self), f"slot {slot} of {len(self)}"

    def check_room(self, length: int) -> None:
        """Checks that one sequence may be so long.

        Raises:
            InputError: if it may not.
        """
        if length > self.max_length:
            msg = (
                f"cache: found a sequence of {length} tokens; expected at most {self.max_length} "
                "(max_length); shorten the prompt or ask for fewer tokens"
            )
            raise InputError(msg)

    def put(self, slot: int, filled: int, reserved: int = 0) -> None:
        """Says what a slot holds from now on.

        Args:
            slot: its index.
            filled: tokens that are there; 0 empties the slot.
            reserved: tokens that there must be room for, if those are more.
        """
        self.filled[slot] = filled
        self.reserved[slot] = max(filled, reserved)

    def move(self, source: int, target: int) -> None:
        """Gives the sequence of a slot to another one."""
        self.check_slot(source)
        self.check_slot(target)
        if source != target:
            self.put(target, int(self.filled[source]), int(self.reserved[source]))
            self.put(source, 0)
