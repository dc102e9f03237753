"""How far the build of an engine is, and how it is stopped."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsInt

if TYPE_CHECKING:
    from collections.abc import Callable

    import tensorrt as trt

    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["PERCENT", "BuildTally", "BuildWatch", "build_monitor"]

PERCENT = 100  # steps of one build


@dataclass(frozen=True, slots=True)
class BuildWatch:
    """Who is told of a build.

    Attributes:
        advance: is told of the percents that were done since it was told last; may be called from
            any thread. A finished build has told of `PERCENT` in all.
        stop: ends the build as soon as TensorRT asks.
    """

    advance: Callable[[int], None]
    stop: threading.Event


class BuildTally:
    """Tells a watch of each percent of one build once, even if TensorRT begins again."""

    def __init__(self, watch: BuildWatch) -> None:
        self._watch = watch
        self._told = 0

    def reach(self, percent: int) -> None:
        """So much is done."""
        if percent > self._told:
            self._watch.advance(percent - self._told)
            self._told = percent

    @property
    def is_stopped(self) -> bool:
        """Whether the build is to end."""
        return self._watch.stop.is_set()


def build_monitor(bindings: Bindings, tally: BuildTally) -> trt.IProgressMonitor:
    """What TensorRT reports to while it builds one engine.

    Phases lie in each other: a step of one phase is a whole phase below it. Not every step is
    reported, so that whoever has the engine tells of the rest.
    """

    class _Monitor(bindings.IProgressMonitor):  # type: ignore[name-defined,misc]  # at run time
        def __init__(self) -> None:
            bindings.IProgressMonitor.__init__(self)
            self._phases = _Phases()

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt
        ) -> None:
            self._phases.start(phase_name, parent_phase, int(num_steps))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            self._phases.complete(phase_name, int(step), tally)
            return not tally.is_stopped

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

    return _Monitor()


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class _Phases:
    """The share of a build that is done, from the phases that are under way."""

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._open[name] = _Phase(parent, max(steps, 1))

    def complete(self, name: str, step: int, tally: BuildTally) -> None:
        """Tells of a step; the last percent is kept back for the end."""
        with self._lock:
            if name in self._open:
                self._open[name].done = step + 1
            tally.reach(min(int(PERCENT * self._share(name)), PERCENT - 1))

    def finish(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

    def _share(self, name: str) -> float:
        """Of the outermost phase, with what is done of the phases inside its current step."""
        share, current = 0.0, self._open.get(name)
        while current is not None:
            share = min((current.done + share) / current.steps, 1.0)
            current = self._open.get(current.parent) if current.parent else None
        return share
