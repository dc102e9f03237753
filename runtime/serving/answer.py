"""An answer that is read while it is made, by threads and by event loops."""

from __future__ import annotations

import asyncio
import itertools
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from vlmport.errors import VlmportError
    from vlmport.runtime.request import GenerationResult, Piece

__all__ = ["Answer"]


class Answer:
    """The answer to one request of a `GenerationService`.

    Iterate over its pieces (`for` or `async for`), or wait for the whole (`result()` or `await`).
    Each iteration begins with the first piece. A reader who leaves an iteration before its end, or
    whose task is cancelled, cancels the request. Slow readers hold nobody up: pieces are kept, and
    they are at most as many as the request's max_new_tokens.

    Args:
        cancel: asks for the request's end and returns at once.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._result: GenerationResult | None = None
        self._error: VlmportError | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete, or has ended by an error."""
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        """Takes the request back, which then ends with CancelledError; too late it does nothing.

        Returns at once; the worker frees the slot before its next step.
        """
        if not self.is_done:
            self._cancel()

    def result(self) -> GenerationResult:
        """Waits for the whole answer.

        Raises:
            CancelledError: if the request was taken back, or the service was closed.
            DeadlineError: if the request's time was up.
            VlmportError: if the model's numbers overflowed, a callback raised or the worker failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.is_done)
        return self._outcome()

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come; raises what `result` raises."""
        try:
            for number in itertools.count():
                with self._changed:
                    self._changed.wait_for(partial(self._has, number))
                if number == len(self._pieces):
                    break
                yield self._pieces[number]
        finally:
            self.cancel()
        self._outcome()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces as they come; raises what `result` raises."""
        try:
            for number in itertools.count():
                await self._wait(partial(self._has, number))
                if number == len(self._pieces):
                    break
                yield self._pieces[number]
        finally:
            self.cancel()
        self._outcome()

    def __await__(self) -> Generator[object, None, GenerationResult]:
        """Waits for the whole answer as `result` does, and lets the event loop go on."""
        return self._awaited().__await__()

    def push(self, piece: Piece) -> None:
        """Adds the next piece; for the worker."""
        with self._changed:
            self._pieces.append(piece)
            self._wake()

    def finish(self, result: GenerationResult | None, error: VlmportError | None) -> None:
        """Ends the answer with one of the two; for the worker."""
        assert (result is None) != (error is None)
        with self._changed:
            self._result, self._error = result, error
            self._wake()

    def _has(self, number: int) -> bool:
        """Whether the piece of that number is there, or will never be."""
        return number < len(self._pieces) or self.is_done

    def _outcome(self) -> GenerationResult:
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    async def _awaited(self) -> GenerationResult:
        try:
            await self._wait(lambda: self.is_done)
        finally:
            self.cancel()
        return self._outcome()

    async def _wait(self, is_true: Callable[[], bool]) -> None:
        while True:
            loop = asyncio.get_running_loop()
            with self._changed:
                if is_true():
                    return
                future: asyncio.Future[None] = loop.create_future()
                self._waiters.append((loop, future))
            await future

    def _wake(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with suppress(RuntimeError):  # its event loop was closed, so that nobody waits
                loop.call_soon_threadsafe(_set, future)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
