"""The memory of slots: a GPU's, or the host's where the CPU runs what is made for a GPU."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import TYPE_CHECKING

from vlmport.runtime.device.memory import DeviceBuffer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vlmport.runtime.device.cuda import Cuda, Stream, Strided

__all__ = ["GpuRowMemory", "HostRowMemory"]


class GpuRowMemory:
    """A GPU's memory, through the CUDA runtime; see `RowMemory`.

    Args:
        cuda: the GPU.
        stream: what the copies are queued in.
        lock: is held while they are; None if nobody else queues work in that stream.
        waits: whether the decoder runs in another stream, so that the host waits for the end.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: Stream,
        lock: AbstractContextManager[object] | None = None,
        *,
        waits: bool,
    ) -> None:
        self._cuda = cuda
        self._stream = stream
        self._lock: AbstractContextManager[object] = lock or nullcontext()
        self._waits = waits

    def allocate(self, size: int) -> DeviceBuffer:
        """Bytes whose content is not set; see `RowMemory.allocate`."""
        return DeviceBuffer(self._cuda, size, "keys and values of a prompt that are kept")

    def copy(self, target: Strided, source: Strided, width: int, height: int) -> None:
        """Queues a copy; see `RowMemory.copy`."""
        with self._lock:
            self._stream.copy_strided(target, source, width, height)

    def clear(self, address: int, size: int) -> None:
        """Queues zeroing; see `RowMemory.clear`."""
        with self._lock:
            self._stream.clear(address, size)

    def finish(self) -> None:
        """Waits if the decoder would not; see `RowMemory.finish`."""
        if self._waits:
            self._stream.synchronize()


class HostRowMemory:
    """Memory of the host by its addresses; see `RowMemory`."""

    def allocate(self, size: int) -> HostBytes:
        """Bytes; see `RowMemory.allocate`."""
        return HostBytes(size)

    def copy(self, target: Strided, source: Strided, width: int, height: int) -> None:
        """Copies at once; see `RowMemory.copy`."""
        for row in range(height):
            giving = source.address + row * source.pitch
            ctypes.memmove(target.address + row * target.pitch, giving, width)

    def clear(self, address: int, size: int) -> None:
        """Zeroes at once; see `RowMemory.clear`."""
        ctypes.memset(address, 0, size)

    def finish(self) -> None:
        """Does nothing: all is done."""


class HostBytes:
    """Bytes of the host that are given back with the object."""

    def __init__(self, size: int) -> None:
        self._content = ctypes.create_string_buffer(size)

    @property
    def address(self) -> int:
        """Where they lie."""
        return ctypes.addressof(self._content)
