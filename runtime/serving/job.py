"""A request in the worker's hands, and those who are told of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.errors import VlmportError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.runtime.request import GenerationResult, Piece
    from vlmport.runtime.serving.answer import Answer
    from vlmport.runtime.serving.sequence import Sequence

__all__ = ["Job", "caused"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A prepared request and those who wait for its answer.

    Attributes:
        sequence: the request as the batch takes it.
        answer: gets what is generated.
        on_piece: is called with each piece.
        on_end: is called with the result or an error.
    """

    sequence: Sequence
    answer: Answer
    on_piece: Callable[[Piece], None] | None = None
    on_end: Callable[[GenerationResult | None, VlmportError | None], None] | None = None

    @property
    def ticket(self) -> int:
        """The request's."""
        return self.sequence.ticket

    def pass_on(self, piece: Piece) -> VlmportError | None:
        """Hands a piece to all who read; returns what went wrong."""
        self.answer.push(piece)
        if self.on_piece is None:
            return None
        try:
            self.on_piece(piece)
        except BaseException as error:  # sys.exit, too: the thread is not the callback's
            _log.exception("on_piece raised; its request is cancelled")
            return caused("on_piece", error)
        return None

    def finish(self, result: GenerationResult | None, error: VlmportError | None) -> None:
        """Ends the answer with one of the two."""
        self.answer.finish(result, error)
        if self.on_end is None:
            return
        try:
            self.on_end(result, error)
        except BaseException:
            # The answer has ended, so that nothing but the log can tell of it.
            _log.exception("on_end raised; its request had ended")


def caused(subject: str, error: BaseException) -> VlmportError:
    """The error that ends one request, since something of its own has raised."""
    told = VlmportError(f"{subject}: raised {type(error).__name__}: {error}; the request has ended")
    told.__cause__ = error
    return told
