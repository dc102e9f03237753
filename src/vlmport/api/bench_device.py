"""The machine of a benchmark: what it is, how fast its memory is, how much of it is in use."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlmport.api.bench_report import Environment
from vlmport.api.versions import library_versions
from vlmport.errors import VlmportError
from vlmport.runtime.device.cuda import Event, Stream, load_cuda
from vlmport.runtime.device.memory import DeviceBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from vlmport.runtime.device.cuda import Cuda

__all__ = [
    "BandwidthProbe",
    "CpuBandwidth",
    "DeviceMemory",
    "GpuBandwidth",
    "bandwidth_probe",
    "environment",
    "usable_cores",
]

_REPEATS = 3
_COLUMNS = 4096


class BandwidthProbe(Protocol):
    """Measures what the memory of a device gives."""

    method: str

    def measure(self) -> float:
        """Bytes per second, the best of a few runs."""
        ...


class CpuBandwidth:
    """Reads a large array with all threads, in three ways; the fastest counts.

    Args:
        size: bytes of the array; far more than the caches hold.
        threads: that read.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.method = f"reading {size >> 20} MiB with {threads} threads of numpy, the best of 9"
        rows = max(threads, size // (4 * _COLUMNS))
        array = np.ones((rows, _COLUMNS), np.float32)
        self._chunks = np.array_split(array, threads)
        self._size = array.nbytes
        self._vector = np.ones(_COLUMNS, np.float32)
        self._pool = ThreadPoolExecutor(threads)

    def measure(self) -> float:
        """See `BandwidthProbe.measure`."""
        reads: tuple[Callable[[NDArray[np.float32]], Any], ...] = (
            lambda chunk: chunk.max(),
            lambda chunk: chunk.sum(),
            lambda chunk: chunk @ self._vector,
        )
        best = min(self._seconds(read) for read in reads for _ in range(_REPEATS))
        return self._size / best

    def _seconds(self, read: Callable[[NDArray[np.float32]], Any]) -> float:
        started = time.perf_counter()
        list(self._pool.map(read, self._chunks))
        return time.perf_counter() - started


class GpuBandwidth:
    """Copies a large buffer of the GPU to another one: each byte is read and written.

    Args:
        size: bytes of each of the two buffers.
        cuda: the GPU; None to look for one.

    Raises:
        EngineError: if there is no GPU, or not enough memory on it.
    """

    def __init__(self, size: int, cuda: Cuda | None = None) -> None:
        self.method = (
            f"copying {size >> 20} MiB on the GPU, read and written bytes, the best of {_REPEATS}"
        )
        self._size = size
        self._cuda = cuda or load_cuda()
        purpose = "measuring the memory's bandwidth"
        self._source = DeviceBuffer(self._cuda, size, purpose)
        self._target = DeviceBuffer(self._cuda, size, purpose)
        self._stream = Stream(self._cuda)
        self._stream.clear(self._source.address, size)

    def measure(self) -> float:
        """See `BandwidthProbe.measure`."""
        return 2 * self._size / min(self._seconds() for _ in range(_REPEATS))

    def _seconds(self) -> float:
        with Event(self._cuda, timed=True) as begin, Event(self._cuda, timed=True) as end:
            begin.record(self._stream)
            self._stream.copy(self._target.address, self._source.address, self._size)
            end.record(self._stream)
            end.synchronize()
            return end.elapsed_ms(begin) / 1000.0


class DeviceMemory:
    """How much GPU memory this process holds, its CUDA context left out.

    The driver tells only what the whole device has left. Contenders work in turn, so that what
    becomes less while this process works has gone to it.

    Args:
        cuda: the GPU; None to look for one.

    Attributes:
        most: bytes that it held at most at the end of a piece of work.

    Raises:
        EngineError: if there is no GPU.
    """

    def __init__(self, cuda: Cuda | None = None) -> None:
        self.most = 0
        self._held = 0
        self._cuda = cuda or load_cuda()
        self._free = self._cuda.memory()[0]  # the context exists from here on

    def begin(self) -> None:
        """A piece of work begins; what others took meanwhile is theirs."""
        self._free = self._cuda.memory()[0]

    def note(self) -> None:
        """A piece of work has ended."""
        free = self._cuda.memory()[0]
        self._held += self._free - free
        self._free = free
        self.most = max(self.most, self._held)


def bandwidth_probe(size: int, threads: int, *, on_gpu: bool) -> BandwidthProbe:
    """The probe of the device that decodes."""
    return GpuBandwidth(size) if on_gpu else CpuBandwidth(size, threads)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def environment(threads: int) -> Environment:
    """The machine and the versions that a figure belongs to."""
    gpu, driver, gpu_memory = _gpu()
    return Environment(
        platform=platform.platform(),
        processor=_processor(),
        cores=usable_cores(),
        threads=threads,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=round(os.getloadavg()[0], 2),
        gpu=gpu,
        driver=driver,
        gpu_memory_bytes=gpu_memory,
        versions=library_versions(),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> tuple[str, str, int]:
    """(name, highest CUDA version of the driver, bytes); ("", "", 0) without a GPU."""
    try:
        device = load_cuda().device()
    except VlmportError:
        return "", "", 0
    return device.name, ".".join(map(str, device.driver)), device.memory
