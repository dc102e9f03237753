from __future__ import annotations

import numpy as np
import pytest
from support.fake_requests import FakeRequest
from support.fake_slots import NEVER_ENDS, Costs, FakeClock
from support.running_batch import Running, endless, prompt

from vlmport.contract import Manifest
from vlmport.runtime.serving.pacing import PrefillPacing


def measured(step: float, piece: float, tokens: int) -> tuple[PrefillPacing, FakeClock]:
    clock = FakeClock()
    pacing = PrefillPacing(None, clock)
    pacing.begin_round(is_decoding=False)
    for _ in range(20):
        pacing.prefilled(tokens, piece)
        pacing.stepped(step)
    pacing.begin_round(is_decoding=False)
    return pacing, clock


def test_all_may_run_while_nobody_waits_for_a_token() -> None:
    pacing, _ = measured(0.03, 0.03, 64)
    assert pacing.room(is_decoding=False) == 512
    pacing.prefilled(200, 0.1)
    assert pacing.room(is_decoding=False) == 312


@pytest.mark.parametrize(
    ("step", "tokens"), [(0.03, 64), (0.06, 128), (0.02, 32), (0.001, 16), (9.0, 512)]
)
def test_a_piece_takes_about_as_long_as_a_step(step: float, tokens: int) -> None:
    pacing, _ = measured(step, 0.03, 64)
    assert pacing.room(is_decoding=True) == tokens


def test_what_has_run_in_a_round_is_taken_off() -> None:
    pacing, clock = measured(0.06, 0.03, 64)
    clock.now += 0.0299
    pacing.prefilled(64, 0.0299)
    assert pacing.room(is_decoding=True) == 64
    clock.now += 0.03
    pacing.prefilled(64, 0.03)
    assert pacing.room(is_decoding=True) == 0
    pacing.begin_round(is_decoding=False)
    assert pacing.room(is_decoding=True) == 128


def test_what_is_done_after_a_step_is_taken_off() -> None:
    """Rows that end are stored, and tokens are told: the others wait for that, too."""
    pacing, clock = measured(0.06, 0.03, 64)
    pacing.stepped(0.06)
    clock.now += 0.0299
    pacing.begin_round(is_decoding=True)
    assert pacing.room(is_decoding=True) == 64
    clock.now += 1.0
    assert pacing.room(is_decoding=True) == 16


def test_short_pieces_do_not_tell_what_a_token_takes() -> None:
    pacing, _ = measured(0.06, 0.03, 64)
    for _ in range(50):
        pacing.prefilled(1, 0.02)
    pacing.begin_round(is_decoding=False)
    assert pacing.room(is_decoding=True) == 128


def test_one_slow_step_does_not_make_the_next_prefill_as_long() -> None:
    pacing, _ = measured(0.03, 0.03, 64)
    pacing.stepped(3.0)
    assert pacing.room(is_decoding=True) == 64
    for _ in range(20):
        pacing.stepped(0.06)
    assert pacing.room(is_decoding=True) >= 96


def test_a_fixed_number_of_tokens_is_kept_to() -> None:
    pacing = PrefillPacing(40, FakeClock())
    for is_decoding in (False, True):
        pacing.begin_round(is_decoding=False)
        assert pacing.room(is_decoding=is_decoding) == 40
        pacing.prefilled(39, 1.0)
        assert pacing.room(is_decoding=is_decoding) == 1


def test_a_clock_that_does_not_tick_stops_nothing() -> None:
    pacing, _ = measured(0.0, 0.0, 64)
    assert pacing.room(is_decoding=True) > 0


COSTS = (
    Costs(
        call=0.004, prompt_token=0.0005, step=0.030, copied_token=0.00003
    ),  # about a decoder of 12 layers x 768
    Costs(call=0.0, prompt_token=0.001, step=0.010),
    Costs(call=0.008, prompt_token=0.0001, step=0.012),
)


@pytest.mark.parametrize("costs", COSTS)
def test_running_answers_go_on_while_long_prompts_arrive(
    sample_manifest: Manifest, costs: Costs
) -> None:
    """The 99th percentile of the time between two tokens is at most three times the median."""
    running = Running(
        sample_manifest, num_slots=8, cache_tokens=100_000, costs=costs, prefix_bytes=10**6
    )
    generator = np.random.default_rng(3)
    times: dict[int, list[float]] = {}
    shared = generator.integers(1, 20, 700).astype(float)
    lengths = [2000 if ticket % 3 == 0 else 30 for ticket in range(24)]
    for ticket, length in enumerate(lengths):
        own = generator.integers(1, 20, length).astype(float)
        # Some begin with what others have run: that is copied, which takes time, too.
        tokens = (NEVER_ENDS, *(shared if ticket % 4 == 1 else ()), *own)
        running.batch.submit(FakeRequest(tokens, (), 150).sequence(ticket))
        for _ in range(30):
            for event in running.batch.step():
                times.setdefault(event.ticket, []).append(running.clock.now)
    while not running.batch.is_idle:
        for event in running.batch.step():
            times.setdefault(event.ticket, []).append(running.clock.now)
    gaps = np.concatenate([np.diff(stamps) for stamps in times.values()])
    assert len(times) == 24
    assert len(gaps) == 24 * 149
    assert np.quantile(gaps, 0.99) <= 3 * np.median(gaps), np.quantile(gaps, [0.5, 0.99, 1.0])


def test_a_prompt_is_not_cut_finer_than_it_must_be(sample_manifest: Manifest) -> None:
    costs = COSTS[0]
    running = Running(sample_manifest, num_slots=2, cache_tokens=10_000, costs=costs)
    running.batch.submit(FakeRequest(endless(600), (), 60).sequence(0))
    for _ in range(4):
        running.step()
    assert running.slots.prefilled == [512, 88]
    running.batch.submit(FakeRequest(prompt(600, 7), (), 2).sequence(1))
    running.finish()
    pieces = running.slots.prefilled[2:]
    assert len(set(pieces[:-1])) <= 2
    assert max(pieces) * costs.prompt_token + costs.call <= 1.2 * costs.step


def test_prompts_that_must_run_whole_do(sample_manifest: Manifest) -> None:
    running = Running(
        sample_manifest, sees_whole_prompt=True, num_slots=3, cache_tokens=5000, costs=COSTS[0]
    )
    for ticket in range(3):
        request = FakeRequest(endless(600, ticket), (), 9)
        running.batch.submit(request.sequence(ticket))
        running.step()
    running.finish()
    assert running.slots.prefilled == [600, 600, 600]
