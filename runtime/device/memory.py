"""Memory of the GPU, and memory of the host that the GPU copies from and to directly."""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.device.sizes import lay_out

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from vlmport.runtime.device.cuda import Cuda
    from vlmport.runtime.device.sizes import Field

__all__ = ["DeviceBlock", "DeviceBuffer", "PinnedBlock", "Workspace"]

_HOST_ALLOC_DEFAULT = 0


class DeviceBuffer:
    """Bytes of the GPU's memory. They are freed by `close`, or with the object.

    Freeing waits for the GPU, so that what is queued never loses its memory.

    Args:
        cuda: the GPU.
        size: bytes.
        purpose: what it is for, in the message if there is not so much.

    Raises:
        EngineError: if there is not so much memory.
    """

    def __init__(self, cuda: Cuda, size: int, purpose: str) -> None:
        self.size = size
        self.address = cuda.allocate(max(size, 1), purpose)
        self._free = weakref.finalize(self, cuda.call, "cudaFree", self.address)
        self._free.atexit = False  # a process that ends gives everything back

    def __enter__(self) -> Self:
        """The buffer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Frees the memory."""
        self.close()

    def close(self) -> None:
        """Frees the memory; a second time does nothing."""
        self._free()


class DeviceBlock:
    """Several tensors in one piece of the GPU's memory.

    Args:
        cuda: the GPU.
        tensors: name -> element type and shape.
        purpose: as in `DeviceBuffer`.
    """

    def __init__(
        self, cuda: Cuda, tensors: Mapping[str, tuple[str, tuple[int, ...]]], purpose: str
    ) -> None:
        self.fields, size = lay_out(tensors)
        self._buffer = DeviceBuffer(cuda, size, purpose)
        self.address, self.size = self._buffer.address, size

    def __getitem__(self, name: str) -> int:
        """The address of a tensor."""
        return self.address + self.fields[name].offset

    def close(self) -> None:
        """Frees the memory; a second time does nothing."""
        self._buffer.close()


class PinnedBlock:
    """Several numpy arrays in one piece of pinned memory, laid out as a `DeviceBlock` is.

    The arrays must not be used after `close`.

    Args:
        cuda: the GPU that copies.
        tensors: name -> element type, one of numpy's, and shape.

    Raises:
        EngineError: if the host cannot pin so much.
    """

    def __init__(self, cuda: Cuda, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.fields, self.size = lay_out(tensors)
        self.address = int(cuda.call("cudaHostAlloc", self.size, _HOST_ALLOC_DEFAULT))
        self._free = weakref.finalize(self, cuda.call, "cudaFreeHost", self.address)
        self._free.atexit = False
        self._arrays = {name: self._array(field) for name, field in self.fields.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array to read or write in place."""
        return self._arrays[name]

    def address_of(self, name: str) -> int:
        """Where an array lies."""
        return self.address + self.fields[name].offset

    def close(self) -> None:
        """Frees the memory; a second time does nothing."""
        self._arrays = {}
        self._free()

    def _array(self, field: Field) -> NDArray[Any]:
        content = (ctypes.c_byte * field.size).from_address(self.address + field.offset)
        array: NDArray[Any] = np.ctypeslib.as_array(content).view(np.dtype(field.dtype))
        return array.reshape(field.shape)


class Workspace:
    """Memory of the GPU that one piece of work after the other uses; it grows and is kept.

    All work is queued in one stream, so that the next one writes only when the last one has read.

    Args:
        cuda: the GPU.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._buffers: dict[str, DeviceBuffer] = {}

    def address(self, name: str, size: int) -> int:
        """Where `size` bytes lie that are used under this name; their content is undefined."""
        found = self._buffers.get(name)
        if found is None or found.size < size:
            if found is not None:
                found.close()
            self._buffers[name] = DeviceBuffer(self._cuda, size, name)
        return self._buffers[name].address

    def close(self) -> None:
        """Frees the memory."""
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers = {}
