"""The thread that drives a batch, and what crosses the border between it and all others."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.errors import CancelledError, QueueFullError, VlmportError
from vlmport.runtime.serving.job import caused

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.runtime.generate import Row
    from vlmport.runtime.request import GenerationResult
    from vlmport.runtime.serving.batch import ContinuousBatch
    from vlmport.runtime.serving.batch_statistics import BatchStatistics
    from vlmport.runtime.serving.job import Job
    from vlmport.runtime.serving.sequence import Event

__all__ = ["ServingWorker", "WorkerStatistics"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """What the worker does and has done.

    Attributes:
        batch: of the batch, after its last step.
        waiting: requests that have a place and no slot.
        ended: how many requests have ended, by how: None for those that were answered, or the
            class of the error.
    """

    batch: BatchStatistics
    waiting: int
    ended: Counter[type[VlmportError] | None]


class ServingWorker:
    """One thread in which a batch, which is not safe for threads, does all its work.

    A request first gets a place, is prepared by whoever asks, and then is queued. It has its place
    until it has ended, so that their number bounds the work in preparation, too.

    Args:
        batch: what decodes; closed with the worker.
        num_places: requests that have not ended at most.
        result_of: makes the result of a row that has ended.
    """

    def __init__(
        self,
        batch: ContinuousBatch,
        num_places: int,
        result_of: Callable[[Row], GenerationResult],
    ) -> None:
        self._batch = batch
        self._num_places = num_places
        self._result_of = result_of
        self._changed = threading.Condition()
        # Shared with other threads, under the condition's lock:
        self._num_taken = 0  # places
        self._preparing: set[int] = set()
        self._queued: list[Job] = []
        self._cancelled: list[int] = []
        self._refusal: VlmportError | None = None  # why nothing is taken any more
        self._ended: Counter[type[VlmportError] | None] = Counter()
        self._batch_statistics = batch.statistics()
        # The worker's own:
        self._jobs: dict[int, Job] = {}
        # A daemon does not keep a program alive that forgot to close the service; but one that is
        # stopped in the middle of a native call may crash the interpreter's end.
        self._thread = threading.Thread(target=self._run, name="vlmport-serving", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def take_place(self, ticket: int) -> None:
        """Reserves a place for a request that is going to be prepared.

        Args:
            ticket: names it.

        Raises:
            QueueFullError: if there is none.
            VlmportError: if the worker was closed or has failed.
        """
        with self._changed:
            self._check_is_open()
            if self._num_taken >= self._num_places:
                self._ended[QueueFullError] += 1
                msg = (
                    f"queue: found {self._num_taken} requests that are not answered yet; at most "
                    f"{self._num_places} are taken (num_slots and max_queue together); ask again "
                    "later, or raise the limits"
                )
                raise QueueFullError(msg)
            self._num_taken += 1
            self._preparing.add(ticket)

    def leave_place(self, ticket: int, reason: type[VlmportError] | None) -> None:
        """Gives a place back, and counts how its request ended; see `WorkerStatistics.ended`."""
        with self._changed:
            self._preparing.discard(ticket)
            self._num_taken -= 1
            self._ended[reason] += 1

    def queue(self, job: Job) -> None:
        """Hands over a request that has a place.

        Raises:
            InputError: if it can never fit into the cache.
            CancelledError: if it was taken back while it was prepared.
            VlmportError: if the worker was closed or has failed.
        """
        self._batch.check_fits(job.sequence)
        with self._changed:
            self._check_is_open()
            if job.ticket not in self._preparing:
                msg = "request: taken back before it was prepared; ask again"
                raise CancelledError(msg)
            self._preparing.remove(job.ticket)
            self._queued.append(job)
            self._changed.notify()

    def cancel(self, ticket: int) -> None:
        """Takes a request back, in preparation or later; nothing happens if it has ended."""
        with self._changed:
            if ticket in self._preparing:
                self._preparing.remove(ticket)  # `queue` refuses it then
                return
            self._cancelled.append(ticket)
            self._changed.notify()

    def close(self) -> None:
        """Ends all requests and the thread; waits for that, unless called in this thread."""
        with self._changed:
            if self._refusal is None:
                msg = "service: closed before the answer was complete; open another one"
                self._refusal = CancelledError(msg)
            self._changed.notify()
        atexit.unregister(self.close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def check_is_open(self) -> None:
        """Raises the error that every request gets, if there is one."""
        with self._changed:
            self._check_is_open()

    def statistics(self) -> WorkerStatistics:
        """What the worker does and has done."""
        with self._changed:
            batch = self._batch_statistics
            # In preparation, queued here or in the batch; a request that has just ended still has
            # its place for a moment.
            waiting = max(0, self._num_taken - batch.num_active)
            return WorkerStatistics(batch, waiting, self._ended.copy())

    def _check_is_open(self) -> None:
        if self._refusal is not None:
            raise _copy_of(self._refusal)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._hand_out(self._batch.step())
                self._refuse_if_broken()
        except BaseException as error:
            _log.exception("the worker of a service has failed; its requests end")
            msg = (
                f"service: its worker failed ({type(error).__name__}: {error}); it answers nothing "
                "any more; open another one, and report it if that happens again"
            )
            with self._changed:
                self._refusal = VlmportError(msg)
                self._refusal.__cause__ = error
        finally:
            self._end()

    def _take_in(self) -> bool:
        """Waits for work and passes it to the batch; whether there may be more."""
        with self._changed:
            self._batch_statistics = self._batch.statistics()
            self._changed.wait_for(self._has_work)
            if self._refusal is not None:
                return False
            queued, self._queued = self._queued, []
            cancelled, self._cancelled = self._cancelled, []
            # All of them at once, so that none is forgotten if the worker fails at the first.
            self._jobs |= {job.ticket: job for job in queued}
        for job in queued:
            try:
                self._batch.submit(job.sequence)
            except VlmportError as error:
                self._finish(job, None, error)
        for ticket in cancelled:
            self._batch.cancel(ticket)
        return True

    def _refuse_if_broken(self) -> None:
        """Takes nothing more if the batch has closed itself, rather than to prepare it in vain."""
        with self._changed:
            if self._batch.is_closed and self._refusal is None:
                msg = (
                    "service: its backend cannot be used any more, and those whom it answered were "
                    "told why; open another one, and report it if that happens again"
                )
                self._refusal = VlmportError(msg)

    def _has_work(self) -> bool:
        has_news = self._refusal is not None or self._queued or self._cancelled
        return bool(has_news) or not self._batch.is_idle

    def _hand_out(self, events: list[Event]) -> None:
        for event in events:
            job = self._jobs.get(event.ticket)
            if job is None:  # ended here, by a callback that raised
                continue
            error = event.error
            if event.piece is not None:
                error = job.pass_on(event.piece)
            if error is not None:
                self._finish(job, None, error)
                self._batch.cancel(event.ticket)
            elif event.is_last:
                self._finish(job, *self._result(job))

    def _result(self, job: Job) -> tuple[GenerationResult | None, VlmportError | None]:
        try:
            return self._result_of(job.sequence.row), None
        except Exception as error:
            _log.exception("the result of a complete answer cannot be made")
            return None, error if isinstance(error, VlmportError) else caused("result", error)

    def _finish(
        self, job: Job, result: GenerationResult | None, error: VlmportError | None
    ) -> None:
        del self._jobs[job.ticket]
        self.leave_place(job.ticket, None if error is None else type(error))
        job.finish(result, error)

    def _end(self) -> None:
        """Ends all requests by the reason why nothing is taken any more."""
        with self._changed:
            queued, self._queued = self._queued, []
            reason = self._refusal
        assert reason is not None
        self._jobs |= {job.ticket: job for job in queued}
        for job in list(self._jobs.values()):
            self._finish(job, None, _copy_of(reason))
        try:
            self._batch.close()
        except Exception:
            _log.exception("the cache of a service cannot be given back")
        with self._changed:
            self._batch_statistics = self._batch.statistics()


def _copy_of(error: VlmportError) -> VlmportError:
    """An error for one who is told: each is raised in a place of its own."""
    copied = type(error)(*error.args)
    copied.__cause__ = error.__cause__
    return copied
