"""Measures contenders in turn, round after round."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vlmport.api.bench_points import Measurement
from vlmport.api.bench_worker import NotRun, Worker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.api.bench_device import BandwidthProbe
    from vlmport.api.bench_points import Point
    from vlmport.api.progress import Progress

__all__ = ["measure_in_turn"]


def measure_in_turn(
    points: Sequence[Point],
    workers: Mapping[str, Worker | NotRun],
    probe: BandwidthProbe,
    rounds: int,
    settle_seconds: float,
    progress: Progress,
) -> Measurement:
    """Each point once to warm up, compile and allocate, then round after round.

    Args:
        points: what is measured.
        workers: name -> contender, the first being that which the others are compared with.
        probe: measures the memory's bandwidth at the beginning of each round.
        rounds: how often each point is measured.
        settle_seconds: pause before each measurement.
        progress: is told of each.
    """
    measured = Measurement(tuple(points), tuple(workers))
    running = {name: one for name, one in workers.items() if isinstance(one, Worker)}
    for name, one in workers.items():
        if isinstance(one, NotRun):
            measured.refuse(name, one)
    progress.start("warming up", len(points) * len(running))
    for point in points:
        for name, worker in running.items():
            measured.warm_up(point, name, worker)
            progress.advance(1)
    progress.start("measuring", rounds * len(points) * len(running))
    for _ in range(rounds):
        time.sleep(settle_seconds)
        measured.bandwidths.append(probe.measure())
        for point in points:
            for name, worker in running.items():
                time.sleep(settle_seconds)
                measured.measure(point, name, worker)
                progress.advance(1)
    progress.finish()
    return measured
