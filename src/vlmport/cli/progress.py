"""Progress on stderr: a bar on a terminal, one line a task elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

__all__ = ["RichProgress"]

# A total this large can only be a count of bytes; a smaller one counts steps.
_LEAST_BYTES = 64 * 1024


class RichProgress:
    """Shows one task at a time; the next `start` ends the one before.

    Used as a context manager, so that the bar is taken off the terminal however the work ends.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _AmountColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: Task | None = None

    def __enter__(self) -> Self:
        """Put the bar on the terminal."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar off the terminal."""
        self._bars.stop()

    def start(self, description: str, total: int | None = None) -> None:
        """Begin a task; `total` in bytes or steps, None if it is not known."""
        self.finish()
        if not self._console.is_terminal:
            self._console.print(description, markup=False, highlight=False, soft_wrap=True)
        identity = self._bars.add_task(description, total=total)
        self._task = next(task for task in self._bars.tasks if task.id == identity)

    def advance(self, count: int, /) -> None:
        """Add bytes or steps to the task."""
        if self._task is not None:
            self._bars.advance(self._task.id, count)

    def finish(self) -> None:
        """End the task; on a terminal it stays as a line with the time that it took."""
        if self._task is None:
            return
        if self._console.is_terminal:
            seconds = self._task.elapsed or 0.0
            line = f"{self._task.description} ({seconds:.1f} s)"
            self._console.print(line, markup=False, highlight=False, style="dim")
        self._bars.remove_task(self._task.id)
        self._task = None


class _AmountColumn(ProgressColumn):
    """Shows "12.3 of 45.6 MB" or "3 of 12"; nothing for a task of unknown length."""

    def render(self, task: Task) -> Text:
        """The text for one task."""
        if task.total is None:
            return Text("")
        if task.total < _LEAST_BYTES:
            return Text(f"{task.completed:.0f} of {task.total:.0f}")
        speed = f", {task.speed / 1e6:.0f} MB/s" if task.speed else ""
        return Text(f"{task.completed / 1e6:.1f} of {task.total / 1e6:.1f} MB{speed}")
