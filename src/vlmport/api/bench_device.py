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

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = [
    "BandwidthProbe",
    "CpuBandwidth",
    "DeviceMemory",
    "GpuBandwidth",
    "bandwidth_probe",
    "environment",
    "free_and_total",
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

    Raises:
        VlmportError: if there is no GPU, or not enough memory on it.
    """

    def __init__(self, size: int) -> None:
        self.method = f"copying {size >> 20} MiB on the GPU, read and written bytes, the best of 3"
        self._size = size
        runtime = _cuda()
        self._source, self._target = (
            _call(runtime.cudaMalloc(size)),
            _call(runtime.cudaMalloc(size)),
        )
        self._begin, self._end = _call(runtime.cudaEventCreate()), _call(runtime.cudaEventCreate())

    def measure(self) -> float:
        """See `BandwidthProbe.measure`."""
        return 2 * self._size / min(self._seconds() for _ in range(_REPEATS))

    def _seconds(self) -> float:
        runtime = _cuda()
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _call(runtime.cudaEventRecord(self._begin, 0))
        _call(runtime.cudaMemcpyAsync(self._target, self._source, self._size, kind, 0))
        _call(runtime.cudaEventRecord(self._end, 0))
        _call(runtime.cudaEventSynchronize(self._end))
        milliseconds: float = _call(runtime.cudaEventElapsedTime(self._begin, self._end))
        return milliseconds / 1000.0


class DeviceMemory:
    """How much GPU memory this process holds, its CUDA context left out.

    The driver tells only what the whole device has left. Contenders work in turn, so that what
    becomes less while this process works has gone to it.

    Attributes:
        most: bytes that it held at most at the end of a piece of work.

    Raises:
        VlmportError: if there is no GPU.
    """

    def __init__(self) -> None:
        self.most = 0
        self._held = 0
        self._free = free_and_total()[0]  # the context exists from here on

    def begin(self) -> None:
        """A piece of work begins; what others took meanwhile is theirs."""
        self._free = free_and_total()[0]

    def note(self) -> None:
        """A piece of work has ended."""
        free = free_and_total()[0]
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
        runtime = _cuda()
        properties = _call(runtime.cudaGetDeviceProperties(0))
        version: int = _call(runtime.cudaDriverGetVersion())
        total = free_and_total()[1]
    except VlmportError:
        return "", "", 0
    name = bytes(properties.name).split(b"\0")[0].decode(errors="replace")
    return name, f"{version // 1000}.{version % 1000 // 10}", total


def free_and_total() -> tuple[int, int]:
    """Bytes of the GPU's memory that are free, and all of them.

    Raises:
        VlmportError: if there is no GPU.
    """
    free, total = _call(_cuda().cudaMemGetInfo())
    return int(free), int(total)


def _cuda() -> Any:  # cuda-python has no types
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        msg = (
            f"cuda-python: cannot be used ({error}); expected for a GPU; pip install 'vlmport[gpu]'"
        )
        raise VlmportError(msg) from error
    return runtime


def _call(answer: tuple[Any, ...]) -> Any:
    """The value of a CUDA call, or its values.

    Raises:
        VlmportError: if the call failed.
    """
    status, *values = answer
    if int(status) != 0:
        msg = (
            f"CUDA: {status.name}; expected a GPU that can be used; "
            "`vlmport doctor` shows what is there"
        )
        raise VlmportError(msg)
    return values[0] if len(values) == 1 else tuple(values)
