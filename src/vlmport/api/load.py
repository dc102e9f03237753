"""Puts a model on a Triton server under load and measures how it answers."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.bench_device import environment
from vlmport.api.client import DEFAULT_MODEL, check_model, connected
from vlmport.api.client_wire import wire_request
from vlmport.api.load_loops import Work, closed_loop, open_loop
from vlmport.api.load_report import LOAD_SCHEMA_VERSION, LoadPoint, LoadReport, load_figures
from vlmport.api.versions import library_versions
from vlmport.errors import InputError

if TYPE_CHECKING:
    from vlmport.api.client_wire import Connection
    from vlmport.api.load_report import RequestRecord
    from vlmport.api.progress import Progress
    from vlmport.runtime.request import Request

__all__ = ["LoadOptions", "load"]

_LIBRARIES = ("tritonclient", "grpcio", "aiohttp")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """A load test.

    Attributes:
        url: host:port or grpc://host:port of gRPC, or http(s)://host:port.
        requests: sent in turn.
        model: the main model's name.
        clients: numbers of clients of a closed loop, each with a connection of its own; a point
            each.
        rates: requests a second of an open loop; a point each.
        count: requests of a point; None for as many as there is time for.
        duration_s: seconds of a point; None if `count` alone ends it.
        warm_up: requests before each point that are not in it, for each client.
        seed: of the arrivals of an open loop.
        timeout_s: most seconds for one answer; None for no limit.

    Raises:
        InputError: if a value is outside its range.
    """

    url: str
    requests: tuple[Request, ...]
    model: str = DEFAULT_MODEL
    clients: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    count: int | None = None
    duration_s: float | None = None
    warm_up: int = 1
    seed: int = 0
    timeout_s: float | None = 600.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        faults = [
            fault
            for is_wrong, fault in (
                (not self.requests, "requests: found none; expected one or more"),
                (
                    not self.clients and not self.rates,
                    "clients, rates: found neither; expected one or more of either",
                ),
                (min(self.clients, default=1) < 1, "clients: expected 1 or more"),
                (
                    not all(0 < rate < math.inf for rate in self.rates),
                    "rates: expected numbers above 0",
                ),
                (
                    self.count is None and self.duration_s is None,
                    "count, duration_s: found neither; a point must end",
                ),
                (self.count is not None and self.count < 1, "count: expected 1 or more"),
                (
                    self.duration_s is not None and not 0 < self.duration_s < math.inf,
                    "duration_s: expected a number above 0",
                ),
                (self.warm_up < 0, "warm_up: expected 0 or more"),
            )
            if is_wrong
        ]
        if faults:
            raise InputError("; ".join(faults))


def load(options: LoadOptions, progress: Progress) -> LoadReport:
    """Runs each point of a load test, closed loops first.

    Failed requests are counted, not raised. An exception, as of Ctrl-C, cancels what is under way.

    Args:
        options: what to do.
        progress: is told of each request.

    Raises:
        ServerError: if the server is not there or the model not ready when it begins.
        InputError: if the URL or a picture cannot be used.
    """
    return asyncio.run(_load(options, progress))


async def _load(options: LoadOptions, progress: Progress) -> LoadReport:
    machine = environment(threads=1)
    versions = library_versions(_LIBRARIES)
    async with connected(options.url) as connection:
        server = await connection.describe()
        await check_model(connection, options.url, options.model)
    return LoadReport(
        schema_version=LOAD_SCHEMA_VERSION,
        url=options.url,
        model=options.model,
        server=server,
        environment=dataclasses.replace(machine, versions=versions),
        different_requests=len(options.requests),
        warm_up=options.warm_up,
        seed=options.seed,
        timeout_s=options.timeout_s,
        points=await _points(options, progress),
    )


async def _points(options: LoadOptions, progress: Progress) -> tuple[LoadPoint, ...]:
    work = Work(
        url=options.url,
        model=options.model,
        requests=tuple(wire_request(one, timeout_s=options.timeout_s) for one in options.requests),
        count=options.count,
        duration_s=options.duration_s,
        timeout_s=options.timeout_s,
        on_end=lambda _: progress.advance(1),
    )
    points: list[LoadPoint] = []
    for clients in options.clients:
        progress.start(f"{clients} clients" if clients > 1 else "1 client", options.count)
        records = await _point(work, options, clients, None)
        points.append(LoadPoint(clients, None, load_figures(records), tuple(records)))
    for rate in options.rates:
        progress.start(f"{rate:g} requests/s", options.count)
        records = await _point(work, options, 1, rate)
        points.append(LoadPoint(None, rate, load_figures(records), tuple(records)))
    progress.finish()
    return tuple(points)


async def _point(
    work: Work, options: LoadOptions, clients: int, rate: float | None
) -> list[RequestRecord]:
    async with AsyncExitStack() as stack:
        connections: list[Connection] = [
            await stack.enter_async_context(connected(options.url)) for _ in range(clients)
        ]
        if options.warm_up:
            warm_up = dataclasses.replace(
                work, count=options.warm_up, duration_s=None, on_end=lambda _: None
            )
            await asyncio.gather(*(closed_loop([one], warm_up) for one in connections))
        if rate is None:
            return await closed_loop(connections, work)
        return await open_loop(connections[0], work, rate, options.seed)
