"""A contender in a process of its own: its memory is its own, and its threads are idle in turn."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlmport.api.bench_contenders import TORCH_CONTENDERS, DecodeTiming, open_contender
from vlmport.api.bench_device import DeviceMemory
from vlmport.api.extras import missing_module_message
from vlmport.errors import InputError, VlmportError
from vlmport.machine.requirements import require_backend

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from vlmport.api.bench_contenders import Contender, ContenderSpec
    from vlmport.api.bench_prompts import BenchPrompt

__all__ = ["MemoryUse", "NotRun", "Worker", "peak_rss_bytes"]

_log = logging.getLogger(__name__)
_END_SECONDS = 10.0
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class NotRun:
    """Why something was not measured."""

    reason: str


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a worker process held at most; see `ContenderFigures`."""

    peak_rss_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Opened:
    computes: str


@dataclass(frozen=True, slots=True)
class _FirstToken:
    prompt: BenchPrompt


@dataclass(frozen=True, slots=True)
class _Decode:
    prompt: BenchPrompt
    batch: int
    steps: int


@dataclass(frozen=True, slots=True)
class _AskMemory:
    pass


_Command = _FirstToken | _Decode | _AskMemory
_Reply = _Opened | NotRun | MemoryUse | DecodeTiming | float
ReplyT = TypeVar("ReplyT", DecodeTiming, MemoryUse, float)
WorkT = TypeVar("WorkT")


class Worker:
    """Opens a contender in a new process and asks it for measurements, one at a time.

    Args:
        spec: what to open.

    Raises:
        InputError: if it cannot be opened; the message is the reason.
    """

    def __init__(self, spec: ContenderSpec) -> None:
        # Not forked: a child of this process would count this one's memory as its own.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        opened = self._receive()
        if not isinstance(opened, _Opened):
            self.close()
            raise InputError(opened.reason if isinstance(opened, NotRun) else "it did not open")
        self.computes = opened.computes

    def first_token(self, prompt: BenchPrompt) -> float | NotRun:
        """Seconds to the first token."""
        return self._ask(_FirstToken(prompt), float)

    def decode(self, prompt: BenchPrompt, batch: int, steps: int) -> DecodeTiming | NotRun:
        """Seconds of decode steps."""
        return self._ask(_Decode(prompt, batch, steps), DecodeTiming)

    def memory(self) -> MemoryUse:
        """What the process has held at most."""
        answer = self._ask(_AskMemory(), MemoryUse)
        return MemoryUse(None, None) if isinstance(answer, NotRun) else answer

    def close(self) -> None:
        """Ends the process, which cleans up after itself if it can."""
        self._connection.close()
        self._process.join(timeout=_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, command: _Command, kind: type[ReplyT]) -> ReplyT | NotRun:
        with contextlib.suppress(OSError):  # a process that has ended is told of below
            self._connection.send(command)
        answer = self._receive()
        assert isinstance(answer, (kind, NotRun))
        return answer

    def _receive(self) -> _Reply:
        try:
            answer: _Reply = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            words = "killed, perhaps for want of memory" if code == -9 else f"exit code {code}"
            return NotRun(f"its process ended ({words})")
        return answer


def peak_rss_bytes() -> int | None:
    """Most resident memory of this process since it was started; None where no /proc tells it.

    getrusage would not do: its maximum outlives exec, so that a process that was started by a
    larger one has the larger one's.
    """
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else None


def _serve(connection: Connection, spec: ContenderSpec) -> None:
    os.dup2(2, 1)  # what libraries print is no result of the command
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side ends this process
    opened = _attempt(lambda: _open(spec))
    # The other side has closed: the work is done, or was interrupted.
    with contextlib.suppress(EOFError, BrokenPipeError):
        if isinstance(opened, NotRun):
            connection.send(opened)
            return
        contender, device = opened
        connection.send(_Opened(contender.computes))
        while True:
            command: _Command = connection.recv()
            connection.send(_attempt(functools.partial(_obey, contender, device, command)))


def _open(spec: ContenderSpec) -> tuple[Contender, DeviceMemory | None]:
    if spec.name not in TORCH_CONTENDERS:
        require_backend(spec.name, spec.bundle, spec.engines)  # its message says what is missing
    device = DeviceMemory() if spec.on_gpu else None
    contender = open_contender(spec)
    if device is not None:
        device.note()
    return contender, device


def _obey(
    contender: Contender, device: DeviceMemory | None, command: _Command
) -> DecodeTiming | MemoryUse | float:
    if isinstance(command, _AskMemory):
        return MemoryUse(peak_rss_bytes(), None if device is None else device.most)
    if device is not None:
        device.begin()
    if isinstance(command, _FirstToken):
        answer: DecodeTiming | float = contender.first_token(command.prompt)
    else:
        answer = contender.decode(command.prompt, command.batch, command.steps)
    if device is not None:
        device.note()
    return answer


def _attempt(work: Callable[[], WorkT]) -> WorkT | NotRun:
    try:
        return work()
    except VlmportError as error:
        return NotRun(str(error))
    except ModuleNotFoundError as error:
        return NotRun(missing_module_message(error.name) or str(error))
    except Exception as error:  # a contender that fails in any way must not end the others
        _log.debug("a contender failed", exc_info=True)
        line = (str(error).strip().splitlines() or ["no message"])[0]
        return NotRun(f"{type(error).__name__}: {line}")
