"""Slots whose model computes each token from everything that lies in its slot."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.backends.base import PromptEmbeddings, StoredTokens

__all__ = [
    "EOS",
    "LATE_LENGTH",
    "LATE_POISON",
    "NEVER_ENDS",
    "POISON",
    "TOKEN_BYTES",
    "VOCAB",
    "Costs",
    "FakeClock",
    "FakeSlots",
    "FakeStored",
    "Misuse",
    "next_logits",
]

VOCAB = 24
TOKEN_BYTES = 10
POISON = 7777.0  # a prompt with this value has numbers that overflow
LATE_POISON = 8888.0  # numbers overflow when the sequence is longer than these tokens
LATE_LENGTH = 12
NEVER_ENDS = 9999.0  # a prompt with this value is answered without end
EOS = 0

# What a slot holds for one token: its value, and a sum over the whole prompt if it saw that.
Item: TypeAlias = tuple[float, int]


class Misuse(BaseException):
    """The slots were asked for what they cannot do; no Exception, which the batch would catch."""


class FakeClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Costs:
    """Seconds that calls take."""

    call: float = 0.0
    prompt_token: float = 0.0
    step: float = 0.0
    copied_token: float = 0.0


@dataclass(frozen=True)
class FakeStored:
    items: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_bytes(self) -> int:
        return TOKEN_BYTES * len(self.items)


class FakeSlots:
    """A `vlmport.runtime.backends.base.SlotDecoding` that checks every call.

    Attributes:
        slots: what each slot holds.
        calls: (name, slots that it was about), in order.
        failing: name of a call that raises, as often as `failures` says.
    """

    def __init__(
        self,
        num_slots: int,
        cache_tokens: int,
        *,
        sees_whole_prompt: bool = False,
        clock: FakeClock | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.slots: list[list[Item]] = [[] for _ in range(num_slots)]
        self.harmed = [False] * num_slots
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.prefilled: list[int] = []
        self.cache_tokens = cache_tokens
        self.is_closed = False
        self.failing: dict[str, int] = {}
        self._sees_whole_prompt = sees_whole_prompt
        self._clock = clock or FakeClock()
        self._costs = costs or Costs()
        self._logits = np.zeros((num_slots, VOCAB), np.float32)

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def token_bytes(self) -> int:
        return TOKEN_BYTES

    def fits(self, num_slots: int, longest: int) -> bool:
        return num_slots <= len(self.slots) and num_slots * longest <= self.cache_tokens

    def prefill(
        self, slot: int, prompt: PromptEmbeddings, start: int, stop: int
    ) -> NDArray[np.float32]:
        self._called("prefill", slot)
        values = [float(value) for value in prompt.numpy()[:, 0]]
        _check(0 <= start < stop <= len(prompt), f"piece {start}:{stop} of {len(prompt)}")
        _check(start <= len(self.slots[slot]), f"slot {slot} lacks tokens before {start}")
        seen = 0
        if self._sees_whole_prompt:
            is_whole = stop == len(prompt) and start in {0, stop - 1}
            _check(is_whole, f"a prompt that must run whole is cut: {start}:{stop}")
            seen = zlib.crc32(repr(values).encode())
        self.slots[slot][start:] = [(value, seen) for value in values[start:stop]]
        self.prefilled.append(stop - start)
        self._clock.now += self._costs.call + self._costs.prompt_token * (stop - start)
        self._check_memory()
        self._logits[0] = self._next(slot)
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._called("step", *range(len(token_ids)))
        _check(0 < len(token_ids) <= len(self.slots), "as many rows as slots at most")
        for slot, token_id in enumerate(token_ids):
            _check(bool(self.slots[slot]), f"slot {slot} is empty and is decoded")
            self.slots[slot].append((float(token_id), 0))
            self._logits[slot] = self._next(slot)
        self._clock.now += self._costs.step
        self._check_memory()
        return self._logits[: len(token_ids)]

    def move(self, source: int, target: int) -> None:
        self._called("move", source, target)
        self._check_empty(target)
        _check(bool(self.slots[source]), f"slot {source} is empty and is moved")
        self.slots[target], self.slots[source] = self.slots[source], []
        self._check_memory()

    def copy(self, source: int, target: int, length: int) -> None:
        self._called("copy", source, target)
        self._check_empty(target)
        _check(0 < length <= len(self.slots[source]), f"{length} tokens of slot {source}")
        self.slots[target] = self.slots[source][:length]
        self._clock.now += self._costs.copied_token * length
        self._check_memory()

    def save(self, slot: int, length: int) -> FakeStored:
        self._called("save", slot)
        _check(0 < length <= len(self.slots[slot]), f"{length} tokens of slot {slot}")
        _check(not _overflows(self.slots[slot]), "faulty numbers are stored")
        self._clock.now += self._costs.copied_token * length
        return FakeStored(tuple(self.slots[slot][:length]))

    def load(self, slot: int, stored: StoredTokens, length: int) -> None:
        self._called("load", slot)
        self._check_empty(slot)
        assert isinstance(stored, FakeStored)
        _check(0 < length <= len(stored), f"{length} of {len(stored)} stored tokens")
        self.slots[slot] = list(stored.items[:length])
        self._clock.now += self._costs.copied_token * length
        self._check_memory()

    def release(self, slot: int, *, is_faulty: bool = False) -> None:
        self._called("release", slot)
        is_harmed = _overflows(self.slots[slot])
        self.harmed[slot] = (self.harmed[slot] or is_harmed) and not is_faulty
        self.slots[slot] = []

    def close(self) -> None:
        self.is_closed = True

    @property
    def occupied(self) -> list[int]:
        """Slots that hold anything."""
        return [slot for slot, items in enumerate(self.slots) if items]

    def _next(self, slot: int) -> NDArray[np.float32]:
        _check(not self.harmed[slot], f"slot {slot} holds numbers of an overflow")
        return next_logits(self.slots[slot])

    def _called(self, name: str, *slots: int) -> None:
        _check(not self.is_closed, f"{name} after close")
        _check(all(0 <= slot < len(self.slots) for slot in slots), f"{name} of {slots}")
        self.calls.append((name, slots))
        if self.failing.get(name, 0):
            self.failing[name] -= 1
            raise RuntimeError(f"{name} failed")

    def _check_empty(self, slot: int) -> None:
        _check(not self.slots[slot], f"slot {slot} is overwritten")

    def _check_memory(self) -> None:
        used = max(self.occupied, default=-1) + 1
        longest = max(map(len, self.slots))
        _check(used * longest <= self.cache_tokens, f"{used} rows of {longest} tokens")


def next_logits(items: Sequence[Item]) -> NDArray[np.float32]:
    """What the model says after these tokens: float32 [VOCAB], other for every content."""
    values = {value for value, _ in items}
    if _overflow(values, len(items)):
        return np.full(VOCAB, np.nan, np.float32)
    generator = np.random.default_rng(hash(tuple(items)) % (1 << 32))
    logits = generator.normal(0.0, 3.0, VOCAB).astype(np.float32)
    if NEVER_ENDS in values:
        logits[EOS] = -100.0
    return logits


def _overflow(values: set[float], length: int) -> bool:
    return POISON in values or (LATE_POISON in values and length > LATE_LENGTH)


def _overflows(items: Sequence[Item]) -> bool:
    return _overflow({value for value, _ in items}, len(items))


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise Misuse(message)
