"""A cache of keys and values whose capacity follows the longest sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.contract import KVLayout

__all__ = ["GrowingCache"]

# ONNX Runtime's Attention works over the whole capacity, not over the content alone, so capacity
# stays close to the content; growing copies the cache once, which steps of an eighth amortize.
_SMALLEST_STEP = 128
_MULTIPLE = 64


class GrowingCache:
    """Key and value arrays [batch, num_kv_heads, capacity, head_dim] of all layers.

    Args:
        layout: form of the cache.
        batch: rows.
        max_length: capacity that is never exceeded.
    """

    def __init__(self, layout: KVLayout, batch: int, max_length: int) -> None:
        self._layout = layout
        self._batch = batch
        self._max_length = max_length
        self.arrays: list[NDArray[Any]] = []
        self.capacity = 0

    def reserve(self, rows: int, filled: int) -> bool:
        """Makes room for `rows` cache rows.

        Args:
            rows: needed capacity, at most max_length.
            filled: rows that hold content and are kept.

        Returns:
            Whether the arrays are new and must be bound again.
        """
        if rows <= self.capacity:
            return False
        step = max(_SMALLEST_STEP, self.capacity // 8) if self.capacity else 0
        wanted = max(rows, self.capacity + step)
        self.capacity = min(self._max_length, -(-wanted // _MULTIPLE) * _MULTIPLE)
        layout = self._layout
        shape = (self._batch, layout.num_kv_heads, self.capacity, layout.head_dim)
        count = 2 * layout.num_layers
        # One array at a time: at no moment do two whole caches exist.
        self.arrays = self.arrays or [np.zeros((0, 0, 0, 0), layout.dtype)] * count
        for index in range(count):
            grown = np.zeros(shape, layout.dtype)
            if filled:
                grown[:, :, :filled] = self.arrays[index][:, :, :filled]
            self.arrays[index] = grown
        return True
