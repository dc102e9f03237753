"""Keys and values of slots at fixed places, in memory that only its device can address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vlmport.runtime.device.cuda import Strided
from vlmport.runtime.device.sizes import itemsize

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vlmport.contract import KVLayout
    from vlmport.runtime.backends.base import StoredTokens

__all__ = ["HeldMemory", "RowMemory", "SlotRows", "StoredRows"]


class HeldMemory(Protocol):
    """Bytes that are given back with the object."""

    @property
    def address(self) -> int:
        """Where they lie."""
        ...


class RowMemory(Protocol):
    """The memory of a device. Work is done in the order in which it is asked for."""

    def allocate(self, size: int) -> HeldMemory:
        """Bytes whose content is not set."""
        ...

    def copy(self, target: Strided, source: Strided, width: int, height: int) -> None:
        """Copies `height` pieces of `width` bytes."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Overwrites bytes by zeros."""
        ...

    def finish(self) -> None:
        """Returns when whoever runs the decoder sees what was copied."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """Keys and values outside of the cache, on the same device; see `StoredTokens`.

    Attributes:
        held: [2 * num_layers, num_kv_heads, length, head_dim].
        length: tokens.
        num_bytes: of the device's memory.
    """

    held: HeldMemory
    length: int
    num_bytes: int

    def __len__(self) -> int:
        """Tokens."""
        return self.length


class SlotRows:
    """The rows of caches [num_slots, num_kv_heads, capacity, head_dim]; see `SlotContent`.

    Args:
        memory: where they lie.
        addresses: of each layer's keys, then its values.
        layout: form of the cache.
        capacity: tokens of a row.

    Attributes:
        row_bytes: of one slot in one of the caches.
    """

    def __init__(
        self, memory: RowMemory, addresses: Sequence[int], layout: KVLayout, capacity: int
    ) -> None:
        self._memory = memory
        self._addresses = addresses
        self._heads = layout.num_kv_heads
        self._token_bytes = layout.head_dim * itemsize(layout.dtype)
        self._head_bytes = capacity * self._token_bytes
        self.row_bytes = self._heads * self._head_bytes

    def make_room(self, filled: NDArray[np.int64], reserved: NDArray[np.int64]) -> None:
        """Does nothing: every slot has room for the longest sequence."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first tokens of a slot to another one; see `SlotContent.copy`."""
        for address in self._addresses:
            giving, taking = self._row(address, source), self._row(address, target)
            self._memory.copy(taking, giving, length * self._token_bytes, self._heads)
        self._memory.finish()

    def save(self, slot: int, length: int) -> StoredRows:
        """Copies the first tokens of a slot; see `SlotContent.save`."""
        width = length * self._token_bytes
        size = len(self._addresses) * self._heads * width
        held = self._memory.allocate(size)
        for index, address in enumerate(self._addresses):
            taking = Strided(held.address + index * self._heads * width, width)
            self._memory.copy(taking, self._row(address, slot), width, self._heads)
        self._memory.finish()
        return StoredRows(held, length, size)

    def load(self, slot: int, stored: StoredTokens, length: int) -> None:
        """Overwrites the first tokens of a slot; see `SlotContent.load`."""
        assert isinstance(stored, StoredRows)  # from this backend
        pitch = stored.length * self._token_bytes
        for index, address in enumerate(self._addresses):
            giving = Strided(stored.held.address + index * self._heads * pitch, pitch)
            width = length * self._token_bytes
            self._memory.copy(self._row(address, slot), giving, width, self._heads)
        self._memory.finish()

    def clear(self, slot: int) -> None:
        """Overwrites a whole slot by zeros; see `SlotContent.clear`."""
        for address in self._addresses:
            self._memory.clear(self._row(address, slot).address, self.row_bytes)
        self._memory.finish()

    def _row(self, address: int, slot: int) -> Strided:
        return Strided(address + slot * self.row_bytes, self._head_bytes)
