"""Sends requests in a closed loop (clients that wait) or an open loop (arrivals that do not)."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.client import timed_answer
from vlmport.api.load_report import RequestRecord
from vlmport.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlmport.api.client_wire import AnswerSource, WireRequest

__all__ = ["Work", "arrivals", "closed_loop", "open_loop"]

# A client that is refused comes back no sooner; a server that is gone is not asked without end.
_SECONDS_AFTER_ERROR = 0.1


@dataclass(frozen=True, slots=True)
class Work:
    """What a loop has to do.

    Attributes:
        url: for messages.
        model: that is asked.
        requests: sent in turn, from the first one on.
        count: requests to send; None for as many as there is time for.
        duration_s: seconds after which no request is sent; what is under way is waited for. None
            for no limit.
        timeout_s: most seconds for one answer.
        on_end: called at the end of each request.
    """

    url: str
    model: str
    requests: tuple[WireRequest, ...]
    count: int | None
    duration_s: float | None
    timeout_s: float | None
    on_end: Callable[[RequestRecord], None]


async def closed_loop(connections: Sequence[AnswerSource], work: Work) -> list[RequestRecord]:
    """One client a connection: each sends its next request when it has its answer."""
    run = _Run(work)
    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(run.client(connection))
    return run.records


async def open_loop(
    connection: AnswerSource, work: Work, rate: float, seed: int
) -> list[RequestRecord]:
    """Requests come at random times and wait for nobody, as those of many users do.

    Args:
        connection: carries all of them.
        work: what to send.
        rate: requests a second, on average.
        seed: of the arrivals.
    """
    run = _Run(work)
    async with asyncio.TaskGroup() as group:
        for due in arrivals(rate, seed):
            if not run.has_more(due):
                break
            await asyncio.sleep(due - run.now())
            group.create_task(run.send(connection, run.take(), due))
    return run.records


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds of a Poisson process: the times between arrivals are exponential; endless."""
    generator = random.Random(seed)
    due = 0.0
    while True:
        due += generator.expovariate(rate)
        yield due


class _Run:
    """The requests of one loop."""

    def __init__(self, work: Work) -> None:
        self.records: list[RequestRecord] = []
        self._work = work
        self._clock = asyncio.get_running_loop().time
        self._started = self._clock()
        self._taken = 0

    def now(self) -> float:
        return self._clock() - self._started

    def has_more(self, due: float) -> bool:
        """Whether one more request is to be sent at a time."""
        work = self._work
        in_time = work.duration_s is None or due < work.duration_s
        return in_time and (work.count is None or self._taken < work.count)

    def take(self) -> int:
        """The next request."""
        self._taken += 1
        return (self._taken - 1) % len(self._work.requests)

    async def client(self, connection: AnswerSource) -> None:
        while self.has_more(self.now()):
            record = await self.send(connection, self.take(), self.now())
            if record.error_kind:
                await asyncio.sleep(_SECONDS_AFTER_ERROR)

    async def send(self, connection: AnswerSource, request: int, due_s: float) -> RequestRecord:
        work = self._work
        sent = self.now()
        parts = connection.stream(work.model, work.requests[request])
        try:
            timed = await timed_answer(parts, work.url, timeout_s=work.timeout_s)
        except ServerError as error:
            record = RequestRecord(
                request, due_s, sent, self.now(), error_kind=error.kind, error=str(error)
            )
        else:
            answer = timed.answer
            record = RequestRecord(
                request,
                due_s,
                sent,
                self.now(),
                token_s=tuple(time - self._started for time in timed.token_times),
                token_ids=answer.token_ids,
                prompt_tokens=answer.prompt_tokens,
                image_tokens=answer.image_tokens,
                finish_reason=answer.finish_reason,
            )
        self.records.append(record)
        work.on_end(record)
        return record
