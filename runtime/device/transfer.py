"""Arrays between the host and the GPU, through pinned memory that is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.device.cuda import Event
from vlmport.runtime.device.memory import PinnedBlock
from vlmport.runtime.device.sizes import ALIGNMENT, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.device.cuda import Cuda, Stream

__all__ = ["Transfer", "from_device_form", "to_device_form"]


class Transfer:
    """Copies whole arrays; its pinned memory grows to the largest one and stays.

    Args:
        cuda: the GPU.
        stream: what the copies are queued in.
    """

    def __init__(self, cuda: Cuda, stream: Stream) -> None:
        self._cuda = cuda
        self._stream = stream
        self._pinned: PinnedBlock | None = None
        self._copied = Event(cuda)

    def upload(self, array: NDArray[Any], dtype: str, address: int) -> None:
        """Queues the copy of an array to the GPU.

        Args:
            array: of numpy's type for `dtype`; for "bfloat16" float32, or ml_dtypes' bfloat16.
            dtype: element type on the GPU.
            address: where it goes.
        """
        content = to_device_form(array, dtype)
        pinned = self._reserve(content.nbytes)
        pinned[: content.nbytes] = content.reshape(-1).view(np.uint8)
        self._stream.copy_in(address, self._address, content.nbytes)
        self._copied.record(self._stream)

    def download(self, address: int, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
        """Waits for all that is queued and copies a tensor of the GPU.

        Returns:
            A new array; float32 for "bfloat16", which numpy has not.
        """
        size = size_of(dtype, shape)
        pinned = self._reserve(size)
        self._stream.copy_out(self._address, address, size)
        self._stream.synchronize()
        return from_device_form(pinned[:size].copy(), dtype, shape)

    def close(self) -> None:
        """Frees the pinned memory."""
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None
        self._copied.close()

    @property
    def _address(self) -> int:
        assert self._pinned is not None
        return self._pinned.address

    def _reserve(self, size: int) -> NDArray[np.uint8]:
        """Pinned memory that no copy reads any more."""
        if self._pinned is not None:
            self._copied.synchronize()
        if self._pinned is None or self._pinned.size < size:
            if self._pinned is not None:
                self._pinned.close()
            # As long as the block, which is aligned: a larger array may still fit into it.
            length = max(-(-size // ALIGNMENT), 1) * ALIGNMENT
            self._pinned = PinnedBlock(self._cuda, {"bytes": ("uint8", (length,))})
        return self._pinned["bytes"]


def to_device_form(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array as its bytes are on the GPU; bfloat16 becomes the uint16 of its bits.

    float32 is rounded to the nearest bfloat16, ties to even, as PyTorch rounds; NaN stays NaN.
    """
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, np.dtype(dtype))
    if array.dtype.itemsize == 2:  # ml_dtypes' bfloat16 or its bits
        return np.ascontiguousarray(array).view(np.uint16)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's bits into its exponent and sign.
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_device_form(content: NDArray[np.uint8], dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    """The array that the GPU's bytes mean; exact float32 for bfloat16."""
    if dtype != "bfloat16":
        return content.view(np.dtype(dtype)).reshape(shape)
    bits = content.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).reshape(shape)
