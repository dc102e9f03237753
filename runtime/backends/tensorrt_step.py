"""A decode step that runs once, is captured into a CUDA graph, and is launched from then on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vlmport.errors import EngineError
from vlmport.runtime.device.capture import capture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlmport.runtime.device.capture import CapturedGraph
    from vlmport.runtime.engines.running import EngineContext, RunningEngines

__all__ = ["RepeatedStep"]

_log = logging.getLogger(__name__)


class RepeatedStep:
    """Work with the same shapes and addresses every time.

    TensorRT prepares a context's new shapes when it runs first, which cannot be captured; so the
    first run is not. What was captured must not run after its contexts changed
    (docs.nvidia.com/deeplearning/tensorrt, "CUDA Graphs"): if another batch has used them, the
    step begins anew.

    Args:
        running: the engines.
        contexts: all that the work runs.
        bind: sets the contexts' shapes and addresses.
        queue: queues the work; does not wait.
    """

    def __init__(
        self,
        running: RunningEngines,
        contexts: Sequence[EngineContext],
        bind: Callable[[], None],
        queue: Callable[[], None],
    ) -> None:
        self._running = running
        self._contexts = contexts
        self._bind = bind
        self._queue = queue
        self._graph: CapturedGraph | None = None
        self._versions: tuple[int, ...] = ()
        self._has_run = False

    def run(self) -> None:
        """Queues the work."""
        self._bind_again()
        if self._graph is None and self._has_run and self._running.captures:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.launch(self._running.stream)
        else:
            self._queue()
            self._has_run = True

    def close(self) -> None:
        """Ends the captured graph."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _bind_again(self) -> None:
        if self._versions == self._bound_versions():
            return  # nobody has used the contexts in between
        self._bind()
        if self._versions != self._bound_versions():
            self.close()
            self._has_run = False
            self._versions = self._bound_versions()

    def _bound_versions(self) -> tuple[int, ...]:
        return tuple(context.version for context in self._contexts)

    def _captured(self) -> CapturedGraph | None:
        try:
            for context in self._contexts:
                context.check_capture()
            return capture(self._running.cuda, self._running.stream, self._queue)
        except EngineError as error:
            self._running.captures = False
            _log.warning(
                "CUDA graphs: a decode step cannot be captured (%s); every step is queued engine "
                "by engine, which takes the host longer",
                str(error),  # a record that is kept must not keep the traceback's memory
            )
            return None
