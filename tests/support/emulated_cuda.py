"""The CUDA runtime over memory of the host, strict where a GPU would be silent.

Work is not done when it is queued but when something waits for it: what reads a result too early,
or writes a source again too early, sees it. Fresh memory is full of NaN. Misuse raises an error.
"""

# ruff: noqa: N802, N815  the names are CUDA's

from __future__ import annotations

import ctypes
import itertools
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cuda.bindings.runtime as real

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EmulatedCuda", "MisuseError", "Work"]

_ALIGNMENT = 256
_OK = real.cudaError_t.cudaSuccess
_KINDS = {
    "cudaMemcpyHostToDevice": ("device", "pinned"),
    "cudaMemcpyDeviceToHost": ("pinned", "device"),
    "cudaMemcpyDeviceToDevice": ("device", "device"),
}


class MisuseError(AssertionError):
    """What would be undefined on a GPU."""


@dataclass(eq=False)
class _Allocation:
    kind: str
    address: int
    size: int
    storage: Any


@dataclass(eq=False)
class Work:
    """Something in a stream.

    Attributes:
        run: does it.
        check: is called when captured work is launched; raises if that is not allowed any more.
    """

    run: Callable[[], None]
    check: Callable[[], None] = lambda: None


@dataclass(eq=False)
class _Stream:
    pending: list[Work] = field(default_factory=list)
    queued: int = 0
    done: int = 0
    captured: list[Work] | None = None
    capturing_thread: int = 0


@dataclass(frozen=True)
class _Handle:
    """What CUDA hands out; int(handle) is its address."""

    kind: str
    number: int

    def __int__(self) -> int:
        return self.number


@dataclass(eq=False)
class _Properties:
    name: bytes
    major: int
    minor: int
    totalGlobalMem: int


class EmulatedCuda:
    """Takes the place of cuda.bindings.runtime.

    Args:
        memory: bytes of the imagined GPU.
        capability: its compute capability.
        count_error: what cudaGetDeviceCount answers.
        captures: whether streams can be captured.

    Attributes:
        allocations: how often cudaMalloc or cudaHostAlloc was called.
        launches: how often a captured graph was launched.
        captured: how many graphs were captured.
        used: bytes of device memory that are allocated.
    """

    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode

    def __init__(
        self,
        memory: int = 1 << 30,
        capability: tuple[int, int] = (8, 9),
        count_error: Any = _OK,
        *,
        captures: bool = True,
    ) -> None:
        self.memory = memory
        self.driver = 13020 if count_error == _OK else 0
        self.allocations = self.launches = self.captured = self.used = 0
        self._capability = capability
        self._count_error = count_error
        self._captures = captures
        self._lock = threading.RLock()
        self._live: dict[int, _Allocation] = {}
        self._numbers = itertools.count(1000)
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, tuple[_Stream, int] | None] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}

    # What tests ask.

    def leaks(self) -> list[str]:
        """Everything that was not given back."""
        left = [f"{one.kind} memory of {one.size} bytes" for one in self._live.values()]
        counts = {
            "stream": len(self._streams),
            "event": len(self._events),
            "graph": len(self._graphs),
            "executable graph": len(self._executables),
        }
        return left + [f"{count} x {name}" for name, count in counts.items() if count]

    def check_range(self, address: int, size: int, kind: str) -> None:
        """Checks that bytes lie in one live allocation."""
        for one in tuple(self._live.values()):
            if one.address <= address and address + size <= one.address + one.size:
                if one.kind != kind:
                    raise MisuseError(f"{size} bytes are {one.kind} memory, expected {kind}")
                return
        raise MisuseError(f"{size} bytes at {address:#x} lie in no live {kind} allocation")

    def queue(self, stream: int, work: Work) -> None:
        """Puts work into a stream, or into the graph that is captured."""
        found = self._stream(stream)
        with self._lock:
            if found.captured is not None:
                found.captured.append(work)
            else:
                found.pending.append(work)
                found.queued += 1

    def is_capturing(self, stream: int) -> bool:
        """Whether what is queued is captured."""
        return self._stream(stream).captured is not None

    # What CUDA answers about itself and the GPU.

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (self._count_error, 1 if self._count_error == _OK else None)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        name = b"Emulated GPU" + bytes(244)
        return _OK, _Properties(name, *self._capability, totalGlobalMem=self.memory)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return _OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return _OK, 13020

    def cudaGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return _OK, str(error.name).encode()

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return _OK, b"as emulated"

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (_OK,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return _OK, self.memory - self.used, self.memory

    # Memory.

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self.used + size > self.memory:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        self.used += size
        return _OK, self._allocate("device", size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return _OK, self._allocate("pinned", size)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.used -= self._free("device", address)
        return (_OK,)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        self._free("pinned", address)
        return (_OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: Any, stream: Any
    ) -> tuple[Any, ...]:
        kinds = _KINDS[kind.name]

        def check() -> None:
            self.check_range(target, size, kinds[0])
            self.check_range(source, size, kinds[1])

        def run() -> None:
            check()
            ctypes.memmove(target, source, size)

        check()
        self.queue(int(stream), Work(run))
        return (_OK,)

    def cudaMemcpy2DAsync(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: Any,
        stream: Any,
    ) -> tuple[Any, ...]:
        if width > min(target_pitch, source_pitch):
            return (real.cudaError_t.cudaErrorInvalidPitchValue,)
        for row in range(height):
            giving, taking = source + row * source_pitch, target + row * target_pitch
            self.cudaMemcpyAsync(taking, giving, width, kind, stream)
        return (_OK,)

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: Any) -> tuple[Any, ...]:
        def run() -> None:
            self.check_range(target, size, "device")
            ctypes.memset(target, value, size)

        self.check_range(target, size, "device")
        self.queue(int(stream), Work(run))
        return (_OK,)

    # Streams and events.

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        handle = _Handle("stream", next(self._numbers))
        self._streams[handle.number] = _Stream()
        return _OK, handle

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        self._wait(self._stream(int(stream)))
        del self._streams[int(stream)]
        return (_OK,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        self._wait(self._stream(int(stream)))
        return (_OK,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        for stream in self._streams.values():
            self._wait(stream)
        return (_OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        handle = _Handle("event", next(self._numbers))
        self._events[handle.number] = None
        return _OK, handle

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:
        if self._events.pop(int(event), "gone") == "gone":
            raise MisuseError("an event is destroyed twice")
        return (_OK,)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        found = self._stream(int(stream))
        if found.captured is not None:
            raise MisuseError("an event is recorded while its stream is captured")
        self._events[int(event)] = (found, found.queued)
        return (_OK,)

    def cudaEventSynchronize(self, event: Any) -> tuple[Any, ...]:
        recorded = self._events[int(event)]
        if recorded is not None:  # CUDA, too, does not wait for an event that was never recorded
            self._wait(recorded[0], recorded[1])
        return (_OK,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, ...]:
        return _OK, 0.5

    # Captured graphs.

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]:
        if not self._captures:
            return (real.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        found = self._stream(int(stream))
        found.captured, found.capturing_thread = [], threading.get_ident()
        return (_OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        found = self._stream(int(stream))
        if found.captured is None:
            raise MisuseError("the stream is not captured")
        handle = _Handle("graph", next(self._numbers))
        self._graphs[handle.number], found.captured = found.captured, None
        return _OK, handle

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        handle = _Handle("executable", next(self._numbers))
        self._executables[handle.number] = self._graphs[int(graph)]
        self.captured += 1
        return _OK, handle

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        del self._graphs[int(graph)]
        return (_OK,)

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Any, ...]:
        del self._executables[int(executable)]
        return (_OK,)

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> tuple[Any, ...]:
        for work in self._executables[int(executable)]:
            work.check()
            self.queue(int(stream), work)
        self.launches += 1
        return (_OK,)

    # How it is done.

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            raise MisuseError("no such stream")
        return self._streams[number]

    def _wait(self, stream: _Stream, until: int | None = None) -> None:
        if stream.captured is not None and stream.capturing_thread == threading.get_ident():
            raise MisuseError("the host waits for a stream that is captured")
        with self._lock:
            while stream.pending and (until is None or stream.done < until):
                work = stream.pending.pop(0)
                stream.done += 1
                work.run()

    def _allocate(self, kind: str, size: int) -> int:
        self._check_no_capture(f"{kind} memory is allocated")
        self.allocations += 1
        storage = ctypes.create_string_buffer(size + _ALIGNMENT)
        address = -(-ctypes.addressof(storage) // _ALIGNMENT) * _ALIGNMENT
        ctypes.memset(address, 0xFF, size)  # NaN in every float
        self._live[address] = _Allocation(kind, address, size, storage)
        return address

    def _free(self, kind: str, address: int) -> int:
        self._check_no_capture(f"{kind} memory is freed")
        self.cudaDeviceSynchronize()
        with self._lock:
            found = self._live.get(address)
            if found is None or found.kind != kind:
                raise MisuseError(f"{kind} memory at {address:#x} is freed twice, or never was")
            del self._live[address]
        return found.size

    def _check_no_capture(self, what: str) -> None:
        """Other threads may do it: captures here are of the kind that is local to a thread."""
        for stream in self._streams.values():
            if stream.captured is not None and stream.capturing_thread == threading.get_ident():
                raise MisuseError(f"{what} while a stream is captured")
