from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import AsyncGenerator, Callable
from itertools import islice

import numpy as np
import pytest
from support.fake_triton import FakeTriton, RefusalError, answer_in_words
from support.virtual_time import run_in_virtual_time

from vlmport.api.client_wire import AnswerPart, ServerDescription, WireRequest
from vlmport.api.load import LoadOptions, load
from vlmport.api.load_loops import Work, arrivals, closed_loop, open_loop
from vlmport.api.load_report import (
    Percentiles,
    RequestRecord,
    inter_token_seconds,
    load_figures,
    load_json,
    percentiles,
)
from vlmport.api.progress import SilentProgress
from vlmport.errors import InputError, ServerError
from vlmport.runtime.request import Request

REQUEST = WireRequest("hello", None, (), (), {}, 0, None)


@dataclasses.dataclass
class TimedServer:
    """Answers in times that are known; as many at once as it has slots.

    Attributes:
        waits: of the n-th request: seconds before each of its tokens; inf for a refusal.
        slots: requests that are answered at once; the others wait.
    """

    waits: Callable[[int], tuple[float, ...]]
    slots: asyncio.Semaphore = dataclasses.field(default_factory=lambda: asyncio.Semaphore(1000))
    asked: int = 0

    async def stream(self, model: str, request: WireRequest) -> AsyncGenerator[AnswerPart]:
        self.asked += 1
        waits = self.waits(self.asked - 1)
        async with self.slots:
            for index, wait in enumerate(waits):
                if math.isinf(wait):
                    raise ServerError("queue: full", "UNAVAILABLE")
                await asyncio.sleep(wait)
                yield AnswerPart("a", (7,), "", 12, 9, index + 1, None)
        yield AnswerPart("", (), "stop", 12, 9, len(waits), None)

    async def describe(self) -> ServerDescription:
        return ServerDescription("timed", "1")

    async def models(self) -> dict[str, str]:
        return {"vlm": "READY"}

    async def is_ready(self, model: str) -> bool:
        return True

    async def close(self) -> None:
        pass


def work(**changes: object) -> Work:
    base = Work("url", "vlm", (REQUEST,), None, None, None, on_end=lambda _: None)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_percentiles_are_the_smallest_values_that_so_many_do_not_exceed() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentiles(values) == Percentiles(100, 50.5, 50.0, 90.0, 95.0, 99.0, 100.0)
    assert percentiles([3.0]) == Percentiles(1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)
    assert percentiles([]) is None


@pytest.mark.parametrize("count", [2, 7, 19, 20, 101, 1000])
def test_percentiles_are_those_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    found = percentiles(values.tolist())
    assert found is not None
    exact = np.quantile(values, (0.5, 0.9, 0.95, 0.99), method="inverted_cdf")
    assert (found.p50, found.p90, found.p95, found.p99) == tuple(exact)


def test_one_client_waits_for_each_answer() -> None:
    # The n-th request: first token after n + 1 tenths of a second, then two tokens 20 ms apart.
    server = TimedServer(lambda n: ((n + 1) / 10, 0.02, 0.02))
    records = run_in_virtual_time(closed_loop([server], work(count=10)))
    found = load_figures(records)
    assert (found.completed, found.failed, found.errors) == (10, 0, {})
    assert found.ttft_ms is not None
    spread = dataclasses.astuple(found.ttft_ms)
    assert spread == pytest.approx((10, 550, 500, 900, 1000, 1000, 1000))
    assert found.inter_token_ms is not None
    assert dataclasses.astuple(found.inter_token_ms) == pytest.approx((20, *[20] * 6))
    assert found.latency_ms is not None
    assert found.latency_ms.p90 == pytest.approx(940)
    seconds = 5.5 + 10 * 0.04
    assert found.seconds == pytest.approx(seconds)
    assert found.requests_per_second == pytest.approx(10 / seconds)
    assert found.tokens_per_second == pytest.approx(30 / seconds)
    assert found.mean_in_flight == pytest.approx(1.0)
    assert records[0].token_ids == (7, 7, 7)
    assert (records[0].prompt_tokens, records[0].image_tokens) == (12, 9)


def test_clients_run_beside_each_other_and_share_the_requests() -> None:
    server = TimedServer(lambda n: (0.1, 0.1))
    records = run_in_virtual_time(
        closed_loop([server] * 4, work(count=10, requests=(REQUEST,) * 3))
    )
    found = load_figures(records)
    # Three rounds of four, four and two.
    assert found.seconds == pytest.approx(0.6)
    assert found.mean_in_flight == pytest.approx(10 * 0.2 / 0.6)
    assert sorted(record.request for record in records) == sorted(n % 3 for n in range(10))


def test_time_ends_a_point_and_what_is_under_way_is_waited_for() -> None:
    server = TimedServer(lambda n: (0.4,))
    records = run_in_virtual_time(closed_loop([server], work(duration_s=1.0)))
    assert [record.due_s for record in records] == pytest.approx([0.0, 0.4, 0.8])
    assert records[-1].end_s == pytest.approx(1.2)


def test_errors_are_counted_by_kind_and_are_in_no_time() -> None:
    server = TimedServer(lambda n: (math.inf,) if n % 3 else (0.1,))
    records = run_in_virtual_time(closed_loop([server], work(count=9)))
    found = load_figures(records)
    assert (found.completed, found.failed, found.errors) == (3, 6, {"UNAVAILABLE": 6})
    assert found.latency_ms is not None
    assert found.latency_ms.count == 3
    assert found.latency_ms.most == pytest.approx(100)
    assert records[1].error == "queue: full"
    # A refused client comes back after a tenth of a second, not at once.
    assert records[-1].end_s == pytest.approx(3 * 0.1 + 5 * 0.1)


def test_an_answer_that_takes_too_long_is_an_error() -> None:
    server = TimedServer(lambda n: (0.1, 60.0))
    records = run_in_virtual_time(closed_loop([server], work(count=1, timeout_s=2.0)))
    assert records[0].error_kind == "TIMEOUT"
    assert records[0].end_s == pytest.approx(3.0)  # one second is the server's, to say so itself


def test_an_open_loop_does_not_wait_and_counts_the_queue_into_the_times() -> None:
    # One request at a time, half a second each, asked for four times a second: a queue grows.
    async def run() -> list[RequestRecord]:
        server = TimedServer(lambda n: (0.5,), slots=asyncio.Semaphore(1))
        return await open_loop(server, work(count=20), 4.0, seed=3)

    records = sorted(run_in_virtual_time(run()), key=lambda record: record.due_s)
    due = list(islice(arrivals(4.0, 3), 20))
    assert [record.due_s for record in records] == due
    ends: list[float] = []
    for arrival in due:
        ends.append(max(arrival, ends[-1] if ends else 0.0) + 0.5)
    assert [record.end_s for record in records] == pytest.approx(ends)
    found = load_figures(records)
    assert found.ttft_ms is not None
    waits = sorted(1e3 * (end - arrival) for end, arrival in zip(ends, due, strict=True))
    assert (found.ttft_ms.p50, found.ttft_ms.most) == pytest.approx((waits[9], waits[-1]))
    assert found.lateness_ms is not None
    assert found.lateness_ms.most == pytest.approx(0.0, abs=1e-6)


def test_an_open_loop_ends_with_its_time() -> None:
    async def run() -> list[RequestRecord]:
        return await open_loop(TimedServer(lambda n: (0.01,)), work(duration_s=2.0), 10.0, 0)

    records = run_in_virtual_time(run())
    assert len(records) == sum(1 for due in islice(arrivals(10.0, 0), 200) if due < 2.0)


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(list(islice(arrivals(5.0, 1), 20000)))
    between = np.diff(times, prepend=0.0)
    assert between.mean() == pytest.approx(1 / 5, rel=0.03)
    assert between.std() == pytest.approx(1 / 5, rel=0.03)  # as the mean, of an exponential
    assert list(islice(arrivals(5.0, 1), 3)) == times[:3].tolist()
    assert list(islice(arrivals(5.0, 2), 3)) != times[:3].tolist()


def test_tokens_of_one_response_share_its_time() -> None:
    record = RequestRecord(0, 0.0, 0.0, 1.0, token_s=(0.1, 0.3, 0.3, 0.4))
    assert inter_token_seconds(record) == pytest.approx([0.1, 0.1, 0.1])
    assert inter_token_seconds(dataclasses.replace(record, token_s=(0.1, 0.1))) == []
    assert inter_token_seconds(dataclasses.replace(record, token_s=())) == []


def test_nothing_sent_has_figures_too() -> None:
    found = load_figures([])
    assert (found.seconds, found.requests_per_second, found.ttft_ms) == (0.0, 0.0, None)


def test_a_load_test_of_a_server_is_written_whole() -> None:
    triton = FakeTriton()
    with triton.grpc() as url:
        options = LoadOptions(
            url,
            (Request(prompt="one two"), Request(prompt="three")),
            clients=(1, 3),
            rates=(200.0,),
            count=6,
            warm_up=2,
        )
        report = load(options, SilentProgress())
    assert [(one.clients, one.rate) for one in report.points] == [(1, None), (3, None), (None, 200)]
    assert [one.figures.completed for one in report.points] == [6, 6, 6]
    # Two of each client (an open loop has one) before the six.
    assert len(triton.asked) == (2 + 6) + (6 + 6) + (2 + 6)
    assert report.points[0].figures.generated_tokens == 3 * 3 + 3 * 2
    written = json.loads(load_json(report))
    assert written["server"] == {"name": "fake", "version": "2.0"}
    assert written["points"][0]["requests"][0]["token_ids"] == [100, 101, 2]
    assert "grpcio" in written["environment"]["versions"]


def test_many_clients_over_http_are_all_answered() -> None:
    triton = FakeTriton()
    with triton.http() as url:
        options = LoadOptions(url, (Request(prompt="one"),), clients=(16,), count=64)
        [point] = load(options, SilentProgress()).points
    assert (point.figures.completed, point.figures.errors) == (64, {})


def test_refusals_under_load_are_counted() -> None:
    def script(asked: object, gone: object) -> object:
        if len(triton.asked) % 2:
            raise RefusalError("queue: full")
        return answer_in_words(asked, gone)  # type: ignore[arg-type]

    triton = FakeTriton(script)  # type: ignore[arg-type]
    with triton.grpc() as url:
        options = LoadOptions(url, (Request(prompt="one"),), clients=(1,), count=4, warm_up=0)
        [point] = load(options, SilentProgress()).points
    assert (point.figures.completed, point.figures.errors) == (2, {"UNKNOWN": 2})


def test_a_server_that_is_not_there_ends_a_load_test_at_once() -> None:
    with pytest.raises(ServerError, match="failed to connect"):
        load(LoadOptions("127.0.0.1:1", (REQUEST_OF_A_USER,), clients=(1,), count=1), SILENT)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"requests": ()}, "requests: found none"),
        ({"clients": ()}, "clients, rates: found neither"),
        ({"clients": (0,)}, "clients: expected 1 or more"),
        ({"rates": (0.0,)}, "rates: expected numbers above 0"),
        ({"rates": (float("nan"),)}, "rates: expected numbers above 0"),
        ({"rates": (1.0, float("inf"))}, "rates: expected numbers above 0"),
        ({"duration_s": float("nan")}, "duration_s: expected a number above 0"),
        ({"count": None}, "a point must end"),
        ({"count": 0}, "count: expected 1 or more"),
        ({"duration_s": 0.0}, "duration_s: expected a number above 0"),
        ({"warm_up": -1}, "warm_up: expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, object], fault: str) -> None:
    base: dict[str, object] = {"requests": (REQUEST_OF_A_USER,), "clients": (1,), "count": 1}
    with pytest.raises(InputError, match=fault):
        LoadOptions("127.0.0.1:1", **(base | changes))  # type: ignore[arg-type]


SILENT = SilentProgress()
REQUEST_OF_A_USER = Request(prompt="hello")
