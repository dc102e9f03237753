"""What a load test found: every request with its times, and the figures that follow from them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.bench_report import Environment
    from vlmport.api.client_wire import ServerDescription

__all__ = [
    "LOAD_SCHEMA_VERSION",
    "LoadFigures",
    "LoadPoint",
    "LoadReport",
    "Percentiles",
    "RequestRecord",
    "inter_token_seconds",
    "load_figures",
    "load_json",
    "percentiles",
]

LOAD_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Percentiles:
    """How a quantity is spread.

    A percentile is the smallest measured value that at least so many percent of the values do not
    exceed (nearest rank), so it is a value that was seen.

    Attributes:
        count: values.
        mean: of them.
        p50: 50th percentile; likewise the next ones.
        p90: 90th.
        p95: 95th.
        p99: 99th.
        most: the largest value.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request; its times are seconds from the begin of its point.

    Attributes:
        request: its place in the list of requests, from 0.
        due_s: when it was to be sent; by the arrivals of an open loop, or when its client was free.
        sent_s: when it was sent; later than due if this program could not keep up.
        token_s: when its tokens came, one time a token.
        end_s: when its answer was complete or failed.
        token_ids: of its answer.
        prompt_tokens: of its prompt.
        image_tokens: among them.
        finish_reason: "stop" or "length"; "" if it failed.
        error_kind: why it failed, in one word; "" if it did not.
        error: the message of its failure.
    """

    request: int
    due_s: float
    sent_s: float
    end_s: float
    token_s: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    image_tokens: int = 0
    finish_reason: str = ""
    error_kind: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What the requests of a point say. Times are of complete answers alone.

    Attributes:
        seconds: from the first request to the end of the last one.
        completed: requests that were answered.
        failed: requests that were not.
        errors: kind -> how many failed so.
        requests_per_second: complete answers.
        tokens_per_second: tokens of complete answers.
        generated_tokens: in all complete answers.
        mean_in_flight: requests that were under way at a time, on average (Little's law: the sum of
            their times / seconds).
        ttft_ms: time to first token, from when the request was due.
        inter_token_ms: time between the tokens of an answer; where several come in one response,
            the time since the response before is shared among them.
        latency_ms: time to the end of the answer, from when the request was due.
        lateness_ms: how much later than due this program sent; if it is not far below the other
            times, they are its own and not the server's.
    """

    seconds: float
    completed: int
    failed: int
    errors: dict[str, int]
    requests_per_second: float
    tokens_per_second: float
    generated_tokens: int
    mean_in_flight: float
    ttft_ms: Percentiles | None
    inter_token_ms: Percentiles | None
    latency_ms: Percentiles | None
    lateness_ms: Percentiles | None


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """The requests of one load.

    Attributes:
        clients: of a closed loop, each of which waits for its answer; None for an open loop.
        rate: requests a second of an open loop, which waits for nothing; None for a closed one.
        figures: of the requests.
        requests: in the order of their end.
    """

    clients: int | None
    rate: float | None
    figures: LoadFigures
    requests: tuple[RequestRecord, ...]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A whole load test.

    Attributes:
        schema_version: of this structure.
        url: of the server.
        model: its main model.
        server: as it names itself.
        environment: the machine of the clients; the server's is not known.
        different_requests: that are sent in turn.
        warm_up: requests before each point that are not in it.
        seed: of the arrivals.
        timeout_s: after which a request was given up.
        points: in the order of the test.
    """

    schema_version: int
    url: str
    model: str
    server: ServerDescription
    environment: Environment
    different_requests: int
    warm_up: int
    seed: int
    timeout_s: float | None
    points: tuple[LoadPoint, ...]


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """The spread of some values; None without one."""
    if not values:
        return None
    ordered = sorted(values)

    def at(percent: int) -> float:
        # In whole numbers: 0.95 * 20 is more than 19 in floating point.
        return ordered[-(-percent * len(ordered) // 100) - 1]

    mean = math.fsum(ordered) / len(ordered)
    return Percentiles(len(ordered), mean, at(50), at(90), at(95), at(99), ordered[-1])


def load_figures(records: Sequence[RequestRecord]) -> LoadFigures:
    """The figures of a point."""
    done = [record for record in records if not record.error_kind]
    began = min((one.due_s for one in records), default=0.0)
    seconds = max((one.end_s for one in records), default=0.0) - began
    tokens = sum(len(record.token_s) for record in done)
    return LoadFigures(
        seconds=seconds,
        completed=len(done),
        failed=len(records) - len(done),
        errors=dict(Counter(one.error_kind for one in records if one.error_kind).most_common()),
        requests_per_second=len(done) / seconds if seconds else 0.0,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        generated_tokens=tokens,
        mean_in_flight=(
            math.fsum(one.end_s - one.due_s for one in records) / seconds if seconds else 0.0
        ),
        ttft_ms=_milliseconds([one.token_s[0] - one.due_s for one in done if one.token_s]),
        inter_token_ms=_milliseconds([gap for one in done for gap in inter_token_seconds(one)]),
        latency_ms=_milliseconds([one.end_s - one.due_s for one in done]),
        lateness_ms=_milliseconds([one.sent_s - one.due_s for one in records]),
    )


def inter_token_seconds(record: RequestRecord) -> list[float]:
    """One value for each token but those of the first response."""
    counts = Counter(record.token_s)  # in the order of time
    gaps: list[float] = []
    for before, now in pairwise(counts):
        gaps += [(now - before) / counts[now]] * counts[now]
    return gaps


def load_json(report: LoadReport) -> str:
    """The report as one JSON object."""
    return json.dumps(dataclasses.asdict(report), ensure_ascii=False) + "\n"


def _milliseconds(seconds: list[float]) -> Percentiles | None:
    return percentiles([1e3 * value for value in seconds])
