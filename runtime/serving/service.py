"""A service: many requests at once, each with an answer that is read while it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.runtime.serving.options import ServingOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from vlmport.errors import VlmportError
    from vlmport.runtime.model import VisionLanguageModel
    from vlmport.runtime.request import GenerationResult, Piece, Request
    from vlmport.runtime.serving.answer import Answer
    from vlmport.runtime.serving.statistics import ServingStatistics

__all__ = ["GenerationService"]


class GenerationService:
    """Answers requests of any number of threads and event loops with one model.

    One worker thread decodes all accepted requests together; each answer is the one that the
    request would get alone. Pictures and prompts are prepared in the thread that submits. Close the
    service, or use it as a context manager.

    Args:
        model: what answers; it may be used beside the service, and is not closed with it.
        options: how much the service takes on at once.

    Raises:
        InputError: if the backend cannot hold as many sequences.
    """

    def __init__(
        self, model: VisionLanguageModel, options: ServingOptions = ServingOptions()
    ) -> None:
        raise NotImplementedError

    def submit(
        self,
        request: Request,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        on_end: Callable[[GenerationResult | None, VlmportError | None], None] | None = None,
    ) -> Answer:
        """Prepares a request in this thread and hands it to the worker.

        What is wrong with a request is raised here, and then nothing is called; afterwards the
        answer tells everything. The callbacks are called in the worker thread, which decodes
        nothing meanwhile; they must be short and may not wait for an answer. One that raises is
        logged, and ends its own request alone.

        Args:
            request: what is asked.
            priority: requests of a smaller one are begun first.
            timeout_s: seconds from now until the answer must be complete; None for no limit.
            on_piece: is called with every piece of the answer, in order.
            on_end: is called once, after the last piece, with the result or with the error that
                ended the request; `Answer.result` gives the same at that time.

        Returns:
            The answer, which the caller may iterate over, wait for, or leave to the callbacks.

        Raises:
            InputError: if an image, the prompt or an option cannot be used, or if the request can
                never fit into the cache.
            QueueFullError: if as many requests are waiting as the service takes; told before
                anything is prepared.
            DeadlineError: if the time was up before the request was prepared.
            CancelledError: if the service was closed.
            VlmportError: if the worker failed, for the reason in the message.
        """
        raise NotImplementedError

    async def submit_async(
        self, request: Request, *, priority: int = 0, timeout_s: float | None = None
    ) -> Answer:
        """Prepares a request in a thread of the event loop's; as `submit` in all else.

        A task that is cancelled meanwhile takes its request back.
        """
        raise NotImplementedError

    def statistics(self) -> ServingStatistics:
        """What the service does now, and did so far."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends every request with CancelledError, waits for the worker and frees the cache.

        May be called more than once. Called in a callback it does not wait.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
