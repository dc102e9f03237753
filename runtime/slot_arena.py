"""A preallocated cache whose rows are laid out anew when the longest sequence changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.contract import KVLayout
    from vlmport.runtime.backends.base import StoredTokens

__all__ = ["HostStoredTokens", "SlotArena", "slot_capacity"]

_MULTIPLE = 64


@dataclass(frozen=True, slots=True, eq=False)
class HostStoredTokens:
    """Keys and values outside of the cache; see `StoredTokens`.

    Attributes:
        content: [2 * num_layers, num_kv_heads, length, head_dim].
    """

    content: NDArray[Any]

    def __len__(self) -> int:
        """Tokens."""
        return int(self.content.shape[2])

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return self.content.nbytes


class SlotArena:
    """Key and value arrays of all layers, each a flat piece of memory of a fixed size.

    A view of the first elements is the cache [rows, num_kv_heads, capacity, head_dim]. ONNX
    Runtime's Attention works over the whole capacity, so that it follows the longest sequence; the
    rows, of which only the filled part is copied, then get other places in the same memory.

    Args:
        layout: form of the cache.
        cache_tokens: tokens of all rows together.
        max_length: tokens of one row at most.

    Attributes:
        capacity: tokens of a row.

    Raises:
        InputError: if there is not so much memory.
    """

    def __init__(self, layout: KVLayout, cache_tokens: int, max_length: int) -> None:
        self._layout = layout
        self._token_size = layout.num_kv_heads * layout.head_dim
        self._cache_tokens = cache_tokens
        self._max_length = max_length
        self.capacity = 0
        shape = (2 * layout.num_layers, cache_tokens * self._token_size)
        try:
            content = np.empty(shape, layout.dtype)
        except MemoryError as error:
            msg = (
                f"cache: {cache_tokens} tokens do not fit into the memory ({error}); ask for a "
                "smaller cache_tokens or fewer slots"
            )
            raise InputError(msg) from error
        # Written at once: the system hands memory out when it is touched, and what serves for days
        # must not find out later that there is none. Zeros, since attention multiplies rows that
        # are not valid by 0, and 0 * NaN is NaN.
        content.fill(0)
        self._flat = list(content)

    def rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        """Views [stop - start, num_kv_heads, capacity, head_dim], keys and values in turns."""
        assert stop * self.capacity <= self._cache_tokens
        return [self._rows(flat, self.capacity, start, stop) for flat in self._flat]

    def make_room(self, filled: NDArray[np.int64], reserved: NDArray[np.int64]) -> None:
        """Changes the capacity if that pays, or must be; see `SlotContent.make_room`."""
        used, longest = int(np.flatnonzero(reserved)[-1]) + 1, int(reserved.max())
        limit = min(self._max_length, self._cache_tokens // used)
        wanted = min(slot_capacity(longest), limit)
        # Shrinking copies what a decode step or two read; it is put off while it saves little.
        if self.capacity < wanted or self.capacity > limit or 4 * wanted <= 3 * self.capacity:
            self._lay_out(wanted, np.minimum(filled, reserved))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first tokens of a row to another one."""
        pairs = zip(self.rows(source, source + 1), self.rows(target, target + 1), strict=True)
        for [giving], [taking] in pairs:
            taking[:, :length] = giving[:, :length]

    def save(self, slot: int, length: int) -> HostStoredTokens:
        """Copies the first tokens of a slot."""
        return HostStoredTokens(
            np.stack([array[0, :, :length] for array in self.rows(slot, slot + 1)])
        )

    def load(self, slot: int, stored: StoredTokens, length: int) -> None:
        """Overwrites the first tokens of a slot."""
        assert isinstance(stored, HostStoredTokens)  # from a backend of this kind
        for array, content in zip(self.rows(slot, slot + 1), stored.content, strict=True):
            array[0, :, :length] = content[:, :length]

    def clear(self, slot: int) -> None:
        """Overwrites a whole slot by zeros."""
        for array in self.rows(slot, slot + 1):
            array.fill(0)

    def close(self) -> None:
        """Gives the memory back."""
        self._flat.clear()

    def _lay_out(self, capacity: int, filled: NDArray[np.int64]) -> None:
        # A row is written where others were that have moved already, or where it was itself, which
        # numpy copies through a temporary array.
        order: list[int] = np.flatnonzero(filled).tolist()
        if capacity > self.capacity:
            order.reverse()
        for flat in self._flat:
            for row in order:
                length = filled[row]
                [source] = self._rows(flat, self.capacity, row, row + 1)
                [target] = self._rows(flat, capacity, row, row + 1)
                target[:, :length] = source[:, :length]
        self.capacity = capacity

    def _rows(self, flat: NDArray[Any], capacity: int, start: int, stop: int) -> NDArray[Any]:
        size = capacity * self._token_size
        shape = (stop - start, self._layout.num_kv_heads, capacity, self._layout.head_dim)
        return flat[start * size : stop * size].reshape(shape)


def slot_capacity(longest: int) -> int:
    """The capacity for a longest sequence: a multiple of 64, at most an eighth or 63 more.

    It depends on the length alone, so that what fits does not depend on what was there before.
    """
    step = max(_MULTIPLE, (1 << (longest - 1).bit_length()) // 16)
    return -(-longest // step) * step
