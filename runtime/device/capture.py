"""Work that is captured once and then launched as a whole."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vlmport.runtime.device.cuda import Cuda, Stream

__all__ = ["CapturedGraph", "capture"]

_INSTANTIATE_DEFAULT = 0


class CapturedGraph:
    """Work with the shapes and addresses that it had when it was captured."""

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda = cuda
        self._executable = executable
        self._destroy = weakref.finalize(self, cuda.call, "cudaGraphExecDestroy", executable)
        self._destroy.atexit = False

    def launch(self, stream: Stream) -> None:
        """Queues the work."""
        self._cuda.call("cudaGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        """Ends the graph; a second time does nothing."""
        self._destroy()


def capture(cuda: Cuda, stream: Stream, queue: Callable[[], None]) -> CapturedGraph:
    """Captures what `queue` queues; nothing of it runs.

    Args:
        cuda: the GPU.
        stream: what is captured; nothing in it may wait for the GPU.
        queue: has queued the same before, so that nothing is left to be prepared.

    Raises:
        EngineError: if something in it cannot be captured; the stream is as before.
    """
    with _without_garbage_collection():
        graph = _captured(cuda, stream, queue)
    try:
        executable = cuda.call("cudaGraphInstantiate", graph, _INSTANTIATE_DEFAULT)
    finally:
        cuda.call("cudaGraphDestroy", graph)
    return CapturedGraph(cuda, executable)


def _captured(cuda: Cuda, stream: Stream, queue: Callable[[], None]) -> Any:
    # Other threads may allocate meanwhile; only what this one does counts.
    mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    cuda.call("cudaStreamBeginCapture", stream.handle, mode)
    try:
        queue()
    except BaseException:
        # Ends the capture; the graph is incomplete, and there is none if the capture was broken.
        _, graph = cuda.runtime.cudaStreamEndCapture(stream.handle)
        cuda.runtime.cudaGetLastError()
        if graph is not None and int(graph) != 0:
            cuda.call("cudaGraphDestroy", graph)
        raise
    return cuda.call("cudaStreamEndCapture", stream.handle)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """It could free a buffer in the middle, which breaks a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
