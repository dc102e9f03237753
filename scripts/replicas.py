#!/usr/bin/env python3
"""How many replicas does a request rate need? From what `vlmport load` measured on one of them.

    scripts/replicas.py load.json --rate 20 [--ttft-ms 1000] [--inter-token-ms 80] [--slots 8]
                        [--utilisation 0.7] [--spare 1] [--into docs/deploy/scaling.md]

docs/deploy/scaling.md explains the arithmetic. Exit code 1 if no measured point keeps the limits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marked_table import write_between

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Demand", "MeasuredPoint", "Replicas", "main", "points_of", "replicas", "report"]

MARKS = ("<!-- replicas: begin -->", "<!-- replicas: end -->")


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """What one replica did under one load.

    Attributes:
        load: in words.
        requests_per_second: complete answers.
        latency_s: mean time of a request.
        ttft_ms: 95th percentile of the time to the first token.
        inter_token_ms: 95th percentile of the time between tokens; 0 for answers of one token.
        failed: requests that were not answered.
    """

    load: str
    requests_per_second: float
    latency_s: float
    ttft_ms: float
    inter_token_ms: float
    failed: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of all replicas together.

    Attributes:
        rate: requests a second.
        ttft_ms: most for the 95th percentile of the time to the first token.
        inter_token_ms: most for that of the time between tokens.
        slots: of a replica.
        utilisation: share of a replica that is used.
        spare: replicas that may be missing.
    """

    rate: float
    ttft_ms: float = math.inf
    inter_token_ms: float = math.inf
    slots: int = 8
    utilisation: float = 0.7
    spare: int = 1

    def is_kept_by(self, point: MeasuredPoint) -> bool:
        """Whether a point is within the limits."""
        return (
            point.failed == 0
            and point.ttft_ms <= self.ttft_ms
            and point.inter_token_ms <= self.inter_token_ms
        )


@dataclass(frozen=True, slots=True)
class Replicas:
    """The arithmetic.

    Attributes:
        point: the largest load that one replica carries within the limits.
        for_rate: replicas that the throughput asks for.
        for_slots: replicas that the requests under way ask for.
        total: the larger of both, and the spare ones.
    """

    point: MeasuredPoint
    for_rate: int
    for_slots: int
    total: int


def points_of(report: dict[str, Any]) -> list[MeasuredPoint]:
    """The points of a report of `vlmport load --json` in which a request was answered."""
    points = []
    for point in report["points"]:
        found = point["figures"]
        if not found["completed"]:
            continue
        clients = point["clients"]
        ttft, gap = found["ttft_ms"], found["inter_token_ms"]
        points.append(
            MeasuredPoint(
                load=_words(clients, point["rate"]),
                requests_per_second=found["requests_per_second"],
                latency_s=found["latency_ms"]["mean"] / 1e3,
                ttft_ms=ttft["p95"] if ttft else 0.0,
                inter_token_ms=gap["p95"] if gap else 0.0,
                failed=found["failed"],
            )
        )
    return points


def _words(clients: int | None, rate: float | None) -> str:
    if clients is None:
        return f"{rate:g} requests/s"
    return "1 client" if clients == 1 else f"{clients} clients"


def replicas(points: list[MeasuredPoint], demand: Demand) -> Replicas | None:
    """How many replicas a demand needs; None if no point keeps its limits."""
    kept = [point for point in points if demand.is_kept_by(point)]
    if not kept:
        return None
    best = max(kept, key=lambda point: point.requests_per_second)
    for_rate = math.ceil(demand.rate / (demand.utilisation * best.requests_per_second))
    under_way = demand.rate * best.latency_s
    for_slots = math.ceil(under_way / (demand.utilisation * demand.slots))
    return Replicas(best, for_rate, for_slots, max(for_rate, for_slots) + demand.spare)


def report(points: list[MeasuredPoint], demand: Demand, found: Replicas | None) -> str:
    """The measured points and the arithmetic, in Markdown."""
    limits = [
        f"{name} at most {value:g} ms"
        for name, value in (
            ("first token", demand.ttft_ms),
            ("between tokens", demand.inter_token_ms),
        )
        if math.isfinite(value)
    ]
    words = f"Limits (95th percentile): {'; '.join(limits) or 'none'}; no failed request."
    if found is None:
        steps = ["No measured load keeps them: measure lower rates."]
    else:
        steps = _steps(demand, found)
    return "\n".join([*_table(points, demand), "", words, "", *steps])


def _table(points: list[MeasuredPoint], demand: Demand) -> list[str]:
    titles = (
        "load on one replica",
        "requests/s",
        "s a request",
        "first token, p95 ms",
        "between tokens, p95 ms",
        "failed",
        "within the limits",
    )
    rows = [
        (
            point.load,
            f"{point.requests_per_second:.2f}",
            f"{point.latency_s:.3f}",
            f"{point.ttft_ms:.1f}",
            f"{point.inter_token_ms:.1f}",
            str(point.failed),
            "yes" if demand.is_kept_by(point) else "no",
        )
        for point in points
    ]
    return [f"| {' | '.join(row)} |" for row in (titles, ("---",) * len(titles), *rows)]


def _steps(demand: Demand, found: Replicas) -> list[str]:
    rate, used, slots = demand.rate, demand.utilisation, demand.slots
    answered, seconds = found.point.requests_per_second, found.point.latency_s
    by_rate = rate / (used * answered)
    by_slots = rate * seconds / (used * slots)
    measured = f"X = {answered:.2f} requests/s and W = {seconds:.3f} s at {found.point.load}"
    capacity = f"{rate:g} / ({used:g} · {answered:.2f})"
    under_way = f"{rate:g} · {seconds:.3f} = {rate * seconds:.2f} under way"
    largest = f"max({found.for_rate}, {found.for_slots}) + {demand.spare} = {found.total}"
    return [
        f"- λ = {rate:g} requests/s; {measured}; S = {slots}; u = {used:g}; r = {demand.spare}",
        f"- throughput: {capacity} = {by_rate:.2f}, so {found.for_rate}",
        f"- slots: {under_way}, / ({used:g} · {slots}) = {by_slots:.2f}, so {found.for_slots}",
        f"- **replicas: {largest}**",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("load", type=Path, help="what `vlmport load --json` wrote")
    parser.add_argument("--rate", type=_above_zero, required=True, help="requests a second")
    parser.add_argument("--ttft-ms", type=_above_zero, default=math.inf)
    parser.add_argument("--inter-token-ms", type=_above_zero, default=math.inf)
    parser.add_argument("--slots", type=_whole(1), default=8)
    parser.add_argument("--utilisation", type=_share, default=0.7)
    parser.add_argument("--spare", type=_whole(0), default=1)
    parser.add_argument("--into", type=Path, help="also write it between the marks of a page")
    options = parser.parse_args(arguments)
    demand = Demand(
        rate=options.rate,
        ttft_ms=options.ttft_ms,
        inter_token_ms=options.inter_token_ms,
        slots=options.slots,
        utilisation=options.utilisation,
        spare=options.spare,
    )
    points = points_of(json.loads(options.load.read_text(encoding="utf-8")))
    found = replicas(points, demand)
    text = report(points, demand, found)
    print(text)
    if options.into is not None:
        write_between(options.into, MARKS, text)
    return 0 if found else 1


def _above_zero(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"found {text}; expected a number above 0")
    return value


def _share(text: str) -> float:
    value = _above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"found {text}; expected a number above 0 and at most 1")
    return value


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"found {text}; expected {least} or more")
        return value

    return read


if __name__ == "__main__":
    sys.exit(main())
