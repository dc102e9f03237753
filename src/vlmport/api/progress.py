"""How long work tells that it goes on."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "SilentProgress"]


class Progress(Protocol):
    """One task at a time: start, advance, finish."""

    def start(self, description: str, total: int | None = None) -> None:
        """Begins a task.

        Args:
            description: shown beside the bar.
            total: bytes (or steps) in all; None if it is not known.
        """
        ...

    def advance(self, count: int, /) -> None:
        """Adds bytes (or steps) to the task."""
        ...

    def finish(self) -> None:
        """Ends the task."""
        ...


class SilentProgress:
    """Shows nothing."""

    def start(self, description: str, total: int | None = None) -> None:
        """Ignored."""

    def advance(self, count: int, /) -> None:
        """Ignored."""

    def finish(self) -> None:
        """Ignored."""
