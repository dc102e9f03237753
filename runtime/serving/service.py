"""A service: many requests at once, each with an answer that is read while it is made."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from vlmport.errors import CancelledError, DeadlineError, InputError, VlmportError
from vlmport.runtime.serving.answer import Answer
from vlmport.runtime.serving.batch import ContinuousBatch
from vlmport.runtime.serving.feature_cache import FeatureCache
from vlmport.runtime.serving.job import Job
from vlmport.runtime.serving.options import ServingOptions
from vlmport.runtime.serving.preparation import prepare_for_batch
from vlmport.runtime.serving.sequence import Sequence
from vlmport.runtime.serving.statistics import ServingStatistics, statistics_of
from vlmport.runtime.serving.worker import ServingWorker

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from vlmport.runtime.model import VisionLanguageModel
    from vlmport.runtime.request import GenerationResult, Piece, Request

__all__ = ["GenerationService"]

_DEFAULTS = ServingOptions()


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

    def __init__(self, model: VisionLanguageModel, options: ServingOptions = _DEFAULTS) -> None:
        self._model = model
        self._features = FeatureCache(options.feature_bytes)
        self._tickets = itertools.count()
        decoding = model.start_slots(options.num_slots, options.cache_tokens)
        # The worker bounds the queue, since it counts the requests in preparation, too.
        num_places = options.num_slots + options.max_queue
        batch = ContinuousBatch(decoding, model.manifest, replace(options, max_queue=num_places))
        self._worker = ServingWorker(batch, num_places, model.result_of)

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
        place = self._take_place(priority, timeout_s)
        return self._queued(request, place, on_piece, on_end)

    async def submit_async(
        self, request: Request, *, priority: int = 0, timeout_s: float | None = None
    ) -> Answer:
        """Prepares a request in a thread of the event loop's; as `submit` in all else.

        A task that is cancelled meanwhile takes its request back.
        """
        place = self._take_place(priority, timeout_s)
        try:
            return await asyncio.to_thread(self._queued, request, place, None, None)
        except BaseException:
            # Mostly a task that is cancelled. The thread cannot be stopped; but one that has not
            # begun may never do, and there is none in an event loop that is closing.
            if place.begin():
                self._worker.leave_place(place.ticket, CancelledError)
            else:  # nothing if the thread has raised, and so given its place back
                self._worker.cancel(place.ticket)
            raise

    def check_is_open(self) -> None:
        """Raises what `submit` raises of every request, if there is such a reason.

        Raises:
            CancelledError: if the service was closed.
            VlmportError: if the worker failed, for the reason in the message.
        """
        self._worker.check_is_open()

    def statistics(self) -> ServingStatistics:
        """What the service does now, and did so far."""
        return statistics_of(self._worker.statistics(), self._features.statistics())

    def close(self) -> None:
        """Ends every request with CancelledError, waits for the worker and frees the cache.

        May be called more than once. Called in a callback it does not wait.
        """
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take_place(self, priority: int, timeout_s: float | None) -> _Place:
        started = time.perf_counter()
        _check_limits(priority, timeout_s)
        ticket = next(self._tickets)
        self._worker.take_place(ticket)
        deadline = None if timeout_s is None else started + timeout_s
        return _Place(ticket, started, priority, deadline)

    def _queued(
        self,
        request: Request,
        place: _Place,
        on_piece: Callable[[Piece], None] | None,
        on_end: Callable[[GenerationResult | None, VlmportError | None], None] | None,
    ) -> Answer:
        if not place.begin():
            msg = "request: taken back before it was prepared; ask again"
            raise CancelledError(msg)
        try:
            row, key = prepare_for_batch(self._model, request, self._features, place.started)
            if place.deadline is not None and time.perf_counter() >= place.deadline:
                msg = "request: not prepared within its time; allow more, or give smaller pictures"
                raise DeadlineError(msg)  # noqa: TRY301
            sequence = Sequence(place.ticket, row, key, place.priority, place.deadline)
            cancel = partial(self._worker.cancel, place.ticket)
            image_tokens = int(row.prompt.image_mask.sum())
            answer = Answer(cancel, len(row.prompt.input_ids), image_tokens)
            self._worker.queue(Job(sequence, answer, on_piece, on_end))
        except BaseException as error:
            kind = type(error) if isinstance(error, VlmportError) else VlmportError
            self._worker.leave_place(place.ticket, kind)
            raise
        return answer


@dataclass(frozen=True, slots=True)
class _Place:
    """An accepted request that is not prepared yet; times are those of time.perf_counter()."""

    ticket: int
    started: float
    priority: int
    deadline: float | None
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """Whether the caller is the first to ask, and so answers for the place."""
        return self._turn.acquire(blocking=False)


def _check_limits(priority: int, timeout_s: float | None) -> None:
    """Checks values that may come from a client's JSON."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        msg = f"priority: found {priority!r}; expected a whole number; smaller ones come first"
        raise InputError(msg)
    if timeout_s is None:
        return
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not is_number or math.isnan(timeout_s) or timeout_s <= 0:
        msg = f"timeout_s: found {timeout_s!r}; expected a number of seconds above 0, or None"
        raise InputError(msg)
