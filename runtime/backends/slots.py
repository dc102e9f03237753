"""What the slots of every backend share: who holds how many tokens, and what fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlmport.errors import InputError
from vlmport.runtime.prompt_pieces import prompt_pieces
from vlmport.runtime.slot_lengths import SlotLengths

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import PromptEmbeddings, StoredTokens
    from vlmport.runtime.prompt_pieces import PromptPiece

__all__ = ["CacheSlots", "SlotContent", "SlotLimits"]


@dataclass(frozen=True, slots=True)
class SlotLimits:
    """How much the slots of a cache hold.

    Attributes:
        num_slots: sequences at most.
        max_length: tokens of one sequence at most.
        cache_tokens: tokens of all slots together at most.
        token_bytes: cache bytes of one token.
        longest_piece: tokens of a prompt that run at once at most; None where it is not cut.
    """

    num_slots: int
    max_length: int
    cache_tokens: int
    token_bytes: int
    longest_piece: int | None


class SlotContent(Protocol):
    """Keys and values of the slots, wherever they are."""

    def make_room(self, filled: NDArray[np.int64], reserved: NDArray[np.int64]) -> None:
        """Prepares the slots for more tokens, which fit.

        Args:
            filled: int64 [num_slots], tokens that are there.
            reserved: int64 [num_slots], tokens that there will be; what a slot holds behind them
                is not needed any more.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first tokens of a slot to another one."""
        ...

    def save(self, slot: int, length: int) -> StoredTokens:
        """Copies the first tokens of a slot out of the cache."""
        ...

    def load(self, slot: int, stored: StoredTokens, length: int) -> None:
        """Overwrites the first tokens of a slot."""
        ...

    def clear(self, slot: int) -> None:
        """Overwrites a whole slot by zeros."""
        ...


class CacheSlots(ABC):
    """A `vlmport.runtime.backends.base.SlotDecoding`; subclasses run the decoder.

    Args:
        manifest: the bundle's.
        limits: how much the cache holds.
        content: the cache.
    """

    def __init__(self, manifest: Manifest, limits: SlotLimits, content: SlotContent) -> None:
        self._limits = limits
        self._content = content
        self._first_position = manifest.attention.first_position
        self._lengths = SlotLengths(limits.num_slots, manifest.attention)

    @property
    def num_slots(self) -> int:
        """Sequences that the cache holds at most; see `SlotDecoding.num_slots`."""
        return self._limits.num_slots

    @property
    def token_bytes(self) -> int:
        """Cache bytes of one token; see `SlotDecoding.token_bytes`."""
        return self._limits.token_bytes

    def fits(self, num_slots: int, longest: int) -> bool:
        """Whether slots may grow so far; see `SlotDecoding.fits`."""
        limits = self._limits
        return (
            num_slots <= limits.num_slots
            and longest <= limits.max_length
            and num_slots * longest <= limits.cache_tokens
        )

    def prefill(
        self, slot: int, prompt: PromptEmbeddings, start: int, stop: int
    ) -> NDArray[np.float32]:
        """Runs a piece of a prompt, cut further if it is long; see `SlotDecoding.prefill`."""
        self._lengths.check_piece(slot, len(prompt), start, stop)
        # Room for the whole prompt at once, so that its next pieces do not move the other rows.
        self._begin(slot, start, len(prompt))
        lengths, longest = np.array([stop], np.int64), self._limits.longest_piece
        pieces = prompt_pieces(lengths, self._first_position, longest, start)
        logits = self._run_prompt(slot, prompt, pieces)
        self._lengths.put(slot, stop, len(prompt))
        return logits

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token to each of the first slots; see `SlotDecoding.step`."""
        count = len(token_ids)
        self._lengths.check_step(count)
        filled = self._lengths.filled[:count].copy()
        reserved = self._lengths.reserved.copy()
        reserved[:count] = np.maximum(reserved[:count], filled + 1)
        self._make_room(reserved)
        logits = self._run_step(token_ids, filled)
        self._lengths.filled[:count] = filled + 1
        self._lengths.reserved[:] = reserved
        return logits

    def move(self, source: int, target: int) -> None:
        """Gives a sequence another slot; see `SlotDecoding.move`."""
        self._lengths.check_slot(source)
        if source == target:
            return
        filled, reserved = self._lengths.filled[source], self._lengths.reserved[source]
        assert reserved, f"slot {source} is empty"
        self._begin(target, 0, int(reserved))
        if filled:
            self._content.copy(source, target, int(filled))
        self._lengths.put(target, int(filled), int(reserved))
        self._lengths.put(source, 0)

    def copy(self, source: int, target: int, length: int) -> None:
        """Begins a sequence with tokens of another; see `SlotDecoding.copy`."""
        self._lengths.check_length(source, length)
        if source != target:
            self._begin(target, 0, length)
            self._content.copy(source, target, length)
        self._lengths.put(target, length)

    def save(self, slot: int, length: int) -> StoredTokens:
        """Copies tokens out of the cache; see `SlotDecoding.save`."""
        self._lengths.check_length(slot, length)
        return self._content.save(slot, length)

    def load(self, slot: int, stored: StoredTokens, length: int) -> None:
        """Begins a sequence with stored tokens; see `SlotDecoding.load`."""
        assert 0 < length <= len(stored), (length, len(stored))
        self._begin(slot, 0, length)
        self._content.load(slot, stored, length)
        self._lengths.put(slot, length)

    def release(self, slot: int, *, is_faulty: bool = False) -> None:
        """Empties a slot; see `SlotDecoding.release`."""
        self._lengths.check_slot(slot)
        if is_faulty and self._lengths.reserved[slot]:
            self._content.clear(slot)
        self._lengths.put(slot, 0)

    @abstractmethod
    def close(self) -> None:
        """Gives back the cache; see `SlotDecoding.close`."""

    @abstractmethod
    def _run_prompt(
        self, slot: int, prompt: PromptEmbeddings, pieces: Iterable[PromptPiece]
    ) -> NDArray[np.float32]:
        """Runs pieces of a prompt, one or more; returns the logits [vocab_size] of the last."""

    @abstractmethod
    def _run_step(
        self, token_ids: NDArray[np.int64], filled: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the first slots, which hold `filled` tokens; returns [num_decoded, vocab_size]."""

    def _begin(self, slot: int, kept: int, length: int) -> None:
        """Makes room in a slot and forgets what it holds behind its first tokens."""
        self._lengths.check_slot(slot)
        reserved = self._lengths.reserved.copy()
        reserved[slot] = length
        self._make_room(reserved)
        self._lengths.put(slot, kept, length)

    def _make_room(self, reserved: NDArray[np.int64]) -> None:
        """Prepares the cache for sequences of so many tokens.

        Raises:
            InputError: if they do not fit; nothing has changed then.
        """
        used, longest = int(np.flatnonzero(reserved)[-1]) + 1, int(reserved.max())
        if not self.fits(used, longest):
            limits = self._limits
            msg = (
                f"cache: found {used} sequences of up to {longest} tokens; expected at most "
                f"{limits.max_length} (max_length) each and {limits.cache_tokens} (cache_tokens) "
                f"together, {limits.cache_tokens // used} for each of these; ask for shorter "
                "answers or fewer at once, or for a larger cache"
            )
            raise InputError(msg)
        self._content.make_room(self._lengths.filled, reserved)
