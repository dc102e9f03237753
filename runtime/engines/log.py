"""What TensorRT says while it builds or runs engines, kept apart for each build."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tensorrt as trt

    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["EngineLog", "engine_logger", "listening"]

_LOGGER = logging.getLogger(__name__)
# Said of a graph that is as it should be.
#   The names of the ports' element types are in engine.json, and the runtime binds what it says.
#   TensorRT reads a convolution's INT8 scales in float32, which they are.
_HARMLESS = re.compile(
    r"Make sure (input|output) \w+ has Int64 binding"
    r"|Converting conv (activation|weight) scales to fp32"
)
_NO_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"
_UNUSED = re.compile(r"Unused Input: (\S+)")


@dataclass(frozen=True, slots=True)
class _Message:
    severity: str
    text: str


class EngineLog:
    """The messages of one build."""

    def __init__(self) -> None:
        self._messages: list[_Message] = []
        self._lock = threading.RLock()  # see `_listeners_lock`

    def add(self, severity: str, text: str) -> None:
        """Keeps a message."""
        with self._lock:
            self._messages.append(_Message(severity, text))

    @property
    def errors(self) -> tuple[str, ...]:
        """What went wrong, in the order in which it was said."""
        return self._of("ERROR", "INTERNAL_ERROR")

    @property
    def reason(self) -> str:
        """The last error that says why: a missing GPU is also told of where none is needed."""
        telling = [text for text in self.errors if _NO_DRIVER not in text] or self.errors
        return " ".join((telling or ("TensorRT says no more",))[-1].split())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Each warning once, without those of graphs that are as they should be."""
        found = (text for text in self._of("WARNING") if not _HARMLESS.search(text))
        return tuple(dict.fromkeys(found))

    @property
    def unused_inputs(self) -> tuple[str, ...]:
        """Inputs of the graph or of its nodes that TensorRT said it ignores."""
        found = (match[1] for text in self._of("WARNING") if (match := _UNUSED.search(text)))
        return tuple(dict.fromkeys(found))

    def lines(self) -> list[str]:
        """Every message, for a file."""
        with self._lock:
            return [f"[{message.severity}] {message.text}" for message in self._messages]

    def _of(self, *severities: str) -> tuple[str, ...]:
        with self._lock:
            return tuple(one.text for one in self._messages if one.severity in severities)


# A build says most from the thread that asked for it. What TensorRT says from a thread of its own
# belongs to one of the builds that are under way, so that all of them get it.
_listeners: dict[int, EngineLog] = {}
# Garbage that is collected while it is held may hold a context, which logs when it goes.
_listeners_lock = threading.RLock()


@contextlib.contextmanager
def listening() -> Iterator[EngineLog]:
    """Collects what TensorRT says in this thread, and in threads of its own, within the block.

    A block within a block of the same thread takes its messages away from the outer one.
    """
    log, thread = EngineLog(), threading.get_ident()
    with _listeners_lock:
        outer = _listeners.get(thread)
        _listeners[thread] = log
    try:
        yield log
    finally:
        with _listeners_lock:
            if outer is None:
                del _listeners[thread]
            else:
                _listeners[thread] = outer


_loggers: dict[str, trt.ILogger] = {}


def engine_logger(bindings: Bindings) -> trt.ILogger:
    """The one logger of this process for a TensorRT module, which uses only its first one."""
    with _listeners_lock:
        if bindings.__name__ not in _loggers:
            _loggers[bindings.__name__] = _new_logger(bindings)
        return _loggers[bindings.__name__]


def _new_logger(bindings: Bindings) -> trt.ILogger:
    class _Logger(bindings.ILogger):  # type: ignore[name-defined,misc]  # chosen at run time
        def __init__(self) -> None:
            bindings.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            _deliver(severity.name, msg)

    return _Logger()


def _deliver(severity: str, text: str) -> None:
    if severity == "VERBOSE":
        return
    with _listeners_lock:
        own = _listeners.get(threading.get_ident())
        logs = [own] if own is not None else list(_listeners.values())
    for log in logs:
        log.add(severity, text)
    if not logs:
        level = logging.WARNING if severity != "INFO" else logging.INFO
        _LOGGER.log(level, "TensorRT: %s", text)
