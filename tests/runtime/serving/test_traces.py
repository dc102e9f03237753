"""Requests of all trained checkpoints that come and go as they like: each is answered as alone."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support.real_requests import PreparedRequest, mixed_requests, prepared
from support.trained import exported
from tiny.recipes import RECIPES

from vlmport.errors import CancelledError
from vlmport.runtime import GenerationResult, VisionLanguageModel
from vlmport.runtime.serving.batch import ContinuousBatch
from vlmport.runtime.serving.batch_statistics import BatchStatistics
from vlmport.runtime.serving.options import ServingOptions
from vlmport.runtime.serving.sequence import Event

REQUESTS = 132  # of each family; four families make more than 500
SLOTS, CACHE_TOKENS = 6, 1100


@dataclass(frozen=True)
class Arrival:
    """When a request comes, and goes.

    Attributes:
        step: of the batch, before which it is submitted.
        priority: of the request.
        cancelled: steps after which it is taken back; None if it is not.
    """

    step: int
    priority: int
    cancelled: int | None


def arrivals(count: int, seed: int, pause: float) -> list[Arrival]:
    """In bursts and with pauses; one of eight is taken back, some of them at once."""
    generator = np.random.default_rng(seed)
    steps = np.cumsum(generator.geometric(1 / pause, count) - 1)
    return [
        Arrival(
            int(step),
            int(generator.integers(0, 3)),
            int(generator.integers(0, 20)) if generator.random() < 1 / 8 else None,
        )
        for step in steps
    ]


def run_trace(
    model: VisionLanguageModel,
    asked: list[PreparedRequest],
    arriving: list[Arrival],
    options: ServingOptions,
    clock: Callable[[], float],
) -> tuple[dict[int, list[Event]], BatchStatistics]:
    """What each request is told, by its index."""
    decoding = model._backend.start_slots(options.num_slots, CACHE_TOKENS)
    batch = ContinuousBatch(decoding, model.manifest, options, clock)
    events: dict[int, list[Event]] = defaultdict(list)
    leaving = defaultdict(list)
    waiting = list(enumerate(arriving))[::-1]
    step = 0
    while waiting or not batch.is_idle:
        while waiting and waiting[-1][1].step <= step:
            index, arrival = waiting.pop()
            sequence = asked[index].sequence(model, index, priority=arrival.priority)
            batch.submit(sequence)
            if arrival.cancelled is not None:
                leaving[step + arrival.cancelled].append(index)
        for index in leaving.pop(step, ()):
            batch.cancel(index)
        for event in batch.step():
            events[event.ticket].append(event)
        step += 1
    statistics = batch.statistics()
    assert batch.close() == []
    return events, statistics


def check_trace(
    events: dict[int, list[Event]], arriving: list[Arrival], alone: list[GenerationResult]
) -> None:
    for index, (arrival, expected) in enumerate(zip(arriving, alone, strict=True)):
        told = events[index]
        assert [event.is_last for event in told] == [False] * (len(told) - 1) + [True]
        pieces = [event.piece for event in told if event.piece is not None]
        found = tuple(piece.token_id for piece in pieces)
        text = "".join(piece.text for piece in pieces)
        if told[-1].error is None:
            assert found == expected.token_ids, index
            assert text == expected.text, index
        else:
            assert arrival.cancelled is not None, told[-1].error
            assert isinstance(told[-1].error, CancelledError)
            assert found == expected.token_ids[: len(found)], index
            assert expected.text.startswith(text), index


def ticking() -> Callable[[], float]:
    """A clock that passes the same time between two looks: a trace is the same in each run."""
    return itertools.count(step=0.001).__next__


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_requests_that_come_and_go_are_answered_as_alone(name: str) -> None:
    loaded = VisionLanguageModel.load(exported(name), verify=False, threads=1)
    # Trained answers are short: half of the requests go on behind their end, up to their limit.
    special = replace(loaded.manifest.special_tokens, eos_token_ids=())
    endless = VisionLanguageModel(
        replace(loaded.manifest, special_tokens=special), loaded.tokenizer, loaded._backend
    )
    for model, seed, share in ((loaded, 1, 1.0), (endless, 2, 0.45)):
        requests = mixed_requests(name, model, REQUESTS // 2, seed)
        asked = [prepared(model, request) for request in requests]
        alone = [model.generate_batch([request])[0] for request in requests]
        mean_tokens = float(np.mean([result.generated_tokens for result in alone]))
        # Two ways to arrive: others are neighbours, prompts are cut elsewhere, and less is stored.
        crowded = ServingOptions(SLOTS, max_queue=200, prefix_bytes=1 << 22)
        for trace, (options, pause) in enumerate(
            (
                (crowded, 0.15 * mean_tokens),
                (
                    replace(crowded, num_slots=3, prefill_tokens=24, prefix_bytes=1 << 18),
                    0.2 * mean_tokens,
                ),
            )
        ):
            arriving = arrivals(len(asked), seed + 10 * trace, 1 + pause)
            events, statistics = run_trace(model, asked, arriving, options, ticking())
            check_trace(events, arriving, alone)
            check_that_it_was_crowded(statistics, alone, share)


def check_that_it_was_crowded(
    statistics: BatchStatistics, alone: list[GenerationResult], share: float
) -> None:
    """Requests were decoded together, and found what others had run, as this test is about that."""
    assert statistics.prefix_hits > 0
    assert statistics.num_steps < share * sum(result.generated_tokens - 1 for result in alone)
