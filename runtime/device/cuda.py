"""The CUDA runtime through cuda-python, its errors turned into messages for the user.

cuda-python ships no types, so every call goes through `Cuda.call` by its name; a test compares
`FUNCTIONS` with the installed module.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmport.errors import EngineError
from vlmport.runtime.device.sizes import in_words

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = [
    "FUNCTIONS",
    "Cuda",
    "CudaError",
    "Device",
    "Event",
    "Stream",
    "Strided",
    "find_device",
    "load_cuda",
]

# What vlmport calls of cuda.bindings.runtime.
FUNCTIONS = (
    "cudaDeviceSynchronize",
    "cudaDriverGetVersion",
    "cudaEventCreateWithFlags",
    "cudaEventDestroy",
    "cudaEventElapsedTime",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaFree",
    "cudaFreeHost",
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaHostAlloc",
    "cudaMalloc",
    "cudaMemGetInfo",
    "cudaMemcpy2DAsync",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaRuntimeGetVersion",
    "cudaStreamBeginCapture",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamEndCapture",
    "cudaStreamSynchronize",
)
_STREAM_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy default stream
_EVENT_DEFAULT, _EVENT_WITHOUT_TIME = 0, 2  # cudaEventDefault, cudaEventDisableTiming


class CudaError(EngineError):
    """A call of the CUDA runtime that failed.

    Attributes:
        name: the error's, such as cudaErrorMemoryAllocation.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU.

    Attributes:
        name: as its maker calls it.
        capability: compute capability, such as (8, 9).
        memory: bytes.
        driver: newest CUDA version that the driver knows, such as (13, 0).
        runtime: CUDA version of cuda-python.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    driver: tuple[int, int]
    runtime: tuple[int, int]

    @property
    def tag(self) -> str:
        """The capability as the folders of engines have it: "sm89"."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def load_cuda() -> Cuda:
    """Imports cuda-python and looks for a GPU.

    Raises:
        EngineError: if cuda-python, a driver that is new enough, or a GPU is missing.
    """
    try:
        module: Any = importlib.import_module("cuda.bindings.runtime")
    except Exception as error:  # a broken native package raises whatever its loader raises
        missing = isinstance(error, ModuleNotFoundError)
        found = "not installed" if missing else f"installed, but does not load ({error})"
        msg = f"cuda: {found}; expected cuda-python to drive a GPU; pip install 'vlmport[gpu]'"
        raise EngineError(msg) from error
    return Cuda(module)


def find_device() -> Device | None:
    """The GPU at hand; None without one that can be used, or without cuda-python."""
    try:
        return load_cuda().device()
    except EngineError:
        return None


class Cuda:
    """The first GPU that the process sees (CUDA_VISIBLE_DEVICES chooses).

    Args:
        runtime: cuda.bindings.runtime, or what takes its place in a test.

    Raises:
        EngineError: if there is no GPU, or no driver that is new enough.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self._check_for_device()

    def call(self, function: str, *arguments: Any) -> Any:
        """Calls a function of the CUDA runtime and returns its first value, or None.

        Raises:
            CudaError: if the call failed.
        """
        error, *values = getattr(self.runtime, function)(*arguments)
        if int(error) != 0:
            name = self._text("cudaGetErrorName", error)
            # An error that is not fatal would else be found by the next who asks, TensorRT perhaps.
            self.runtime.cudaGetLastError()
            msg = (
                f"CUDA: {function} answered {name} ({self._text('cudaGetErrorString', error)}); "
                "expected success; `vlmport doctor` shows the GPU and its driver"
            )
            raise CudaError(msg, name)
        return values[0] if values else None

    def memory(self) -> tuple[int, int]:
        """Bytes of the GPU's memory that are free, and all of them."""
        error, free, total = self.runtime.cudaMemGetInfo()
        if int(error) != 0:
            raise CudaError(f"CUDA: cudaMemGetInfo answered {error}", str(error))
        return int(free), int(total)

    def allocate(self, size: int, purpose: str) -> int:
        """Address of `size` bytes of the GPU's memory.

        Args:
            size: bytes.
            purpose: what it is for, in a message.

        Raises:
            EngineError: if there is not so much.
        """
        try:
            return int(self.call("cudaMalloc", size))
        except CudaError as error:
            if error.name != "cudaErrorMemoryAllocation":
                raise
            free, total = self.memory()
            msg = (
                f"GPU memory: {purpose} needs {in_words(size)}; {in_words(free)} of "
                f"{in_words(total)} are free; end other programs on the GPU, build engines with a "
                "smaller --max-batch, --max-length or --prefill-chunk, or take a bundle of a "
                "smaller precision"
            )
            raise EngineError(msg) from error

    def device(self) -> Device:
        """Which GPU it is."""
        properties = self.call("cudaGetDeviceProperties", 0)
        return Device(
            name=bytes(properties.name).split(b"\0")[0].decode(errors="replace"),
            capability=(int(properties.major), int(properties.minor)),
            memory=int(properties.totalGlobalMem),
            driver=_version(self.call("cudaDriverGetVersion")),
            runtime=_version(self.call("cudaRuntimeGetVersion")),
        )

    def synchronize(self) -> None:
        """Waits for all work of the GPU."""
        self.call("cudaDeviceSynchronize")

    def _text(self, function: str, error: Any) -> str:
        text = getattr(self.runtime, function)(error)[1]
        return text.decode() if isinstance(text, bytes) else str(text)

    def _check_for_device(self) -> None:
        try:
            count = int(self.call("cudaGetDeviceCount"))
        except CudaError as error:
            raise EngineError(self._absence(error)) from error
        if count == 0:
            raise EngineError(_NO_DEVICE.format("no device"))

    def _absence(self, error: CudaError) -> str:
        if error.name != "cudaErrorInsufficientDriver":
            return _NO_DEVICE.format(error.name)
        _, driver = self.runtime.cudaDriverGetVersion()
        _, runtime = self.runtime.cudaRuntimeGetVersion()
        # Within a major version older drivers serve (CUDA's minor version compatibility).
        wanted = str(_version(runtime)[0]) if runtime else "of cuda-python"
        found = f"one for CUDA {'.'.join(map(str, _version(driver)))}" if driver else "none"
        return (
            f"NVIDIA driver: found {found} ({error.name}); expected one for CUDA {wanted} or "
            "later; install or update it on a machine with an NVIDIA GPU, or choose the backend "
            "onnxruntime"
        )


@dataclass(frozen=True, slots=True)
class Strided:
    """Pieces of memory at equal distances.

    Attributes:
        address: of the first one.
        pitch: bytes from the beginning of one to that of the next.
    """

    address: int
    pitch: int


class Stream:
    """A queue of work on the GPU; handed out as int(stream) to TensorRT."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle: Any = cuda.call("cudaStreamCreateWithFlags", _STREAM_NON_BLOCKING)

    def __int__(self) -> int:
        """The handle's address."""
        return int(self.handle)

    def synchronize(self) -> None:
        """Waits until all that was queued is done."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def copy_in(self, target: int, source: int, size: int) -> None:
        """Queues a copy from pinned memory to the GPU."""
        self._copy(target, source, size, "cudaMemcpyHostToDevice")

    def copy_out(self, target: int, source: int, size: int) -> None:
        """Queues a copy from the GPU to pinned memory."""
        self._copy(target, source, size, "cudaMemcpyDeviceToHost")

    def copy(self, target: int, source: int, size: int) -> None:
        """Queues a copy within the GPU."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def copy_strided(self, target: Strided, source: Strided, width: int, height: int) -> None:
        """Queues a copy within the GPU of pieces that lie apart.

        Args:
            target: where the pieces go.
            source: where they lie.
            width: bytes of a piece.
            height: pieces.
        """
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda.call(
            "cudaMemcpy2DAsync",
            *(target.address, target.pitch, source.address, source.pitch),
            *(width, height, kind, self.handle),
        )

    def clear(self, target: int, size: int) -> None:
        """Queues zeroing."""
        self._cuda.call("cudaMemsetAsync", target, 0, size, self.handle)

    def close(self) -> None:
        """Ends the stream; nothing may be queued any more."""
        self._cuda.call("cudaStreamDestroy", self.handle)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        kinds = self._cuda.runtime.cudaMemcpyKind
        self._cuda.call("cudaMemcpyAsync", target, source, size, getattr(kinds, kind), self.handle)


class Event:
    """A mark in a stream that the host can wait for.

    Args:
        cuda: the GPU.
        timed: whether `elapsed_ms` is asked of it.
    """

    def __init__(self, cuda: Cuda, *, timed: bool = False) -> None:
        self._cuda = cuda
        flags = _EVENT_DEFAULT if timed else _EVENT_WITHOUT_TIME
        self._handle: Any = cuda.call("cudaEventCreateWithFlags", flags)

    def __enter__(self) -> Self:
        """The event itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the event."""
        self.close()

    def record(self, stream: Stream) -> None:
        """Marks the end of what is queued now."""
        self._cuda.call("cudaEventRecord", self._handle, stream.handle)

    def synchronize(self) -> None:
        """Waits until the mark is reached."""
        self._cuda.call("cudaEventSynchronize", self._handle)

    def elapsed_ms(self, earlier: Event) -> float:
        """Milliseconds on the GPU since an earlier mark; both are timed and reached."""
        return float(self._cuda.call("cudaEventElapsedTime", earlier._handle, self._handle))

    def close(self) -> None:
        """Ends the event."""
        self._cuda.call("cudaEventDestroy", self._handle)


_NO_DEVICE = (
    "GPU: found none ({}); expected an NVIDIA GPU that this process may use; look at nvidia-smi "
    "and CUDA_VISIBLE_DEVICES, or choose the backend onnxruntime"
)


def _version(number: Any) -> tuple[int, int]:
    """13020 is CUDA 13.2."""
    return int(number) // 1000, int(number) % 1000 // 10
