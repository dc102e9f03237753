from __future__ import annotations

import pytest
from support.fake_requests import FakeRequest
from support.fake_slots import LATE_LENGTH, LATE_POISON, POISON
from support.running_batch import Running, endless, prompt

from vlmport.contract import Manifest
from vlmport.errors import (
    CancelledError,
    DeadlineError,
    InputError,
    QueueFullError,
    VlmportError,
)
from vlmport.runtime.sampling import SamplingOptions


def test_each_answer_is_what_it_is_alone(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest)
    sampling = SamplingOptions(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=5)
    asked = [
        FakeRequest(prompt(5 + 3 * index, index), (), 4 + index, sampling) for index in range(4)
    ] + [FakeRequest(prompt(30, index), (), 12) for index in range(4)]
    for ticket, request in enumerate(asked):
        running.batch.submit(request.sequence(ticket))
    running.finish()
    for ticket, request in enumerate(asked):
        alone = request.alone()
        assert running.tokens(ticket) == alone.token_ids
        assert running.text(ticket) == alone.stream.text()
        assert running.events[ticket][-1].is_last
    assert running.slots.occupied == []


def places(running: Running) -> tuple[int, int]:
    """How many have a slot, and how many wait."""
    statistics = running.batch.statistics()
    return statistics.num_active, statistics.num_waiting


def test_rows_that_decode_have_the_first_slots(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=4)
    for ticket in range(12):
        request = FakeRequest(prompt(4, ticket), (), 1 + 5 * ticket % 7)
        running.batch.submit(request.sequence(ticket))
    running.finish()
    begun = [slots for name, slots in running.slots.calls if name == "prefill"]
    moved = [slots for name, slots in running.slots.calls if name == "move"]
    assert len(begun) == 12
    assert all(target < source for source, target in moved)
    assert len(moved) <= 12  # each end moves one row at most, and here no newcomer


def test_a_newcomer_whose_prompt_runs_while_others_end_is_moved_once(
    sample_manifest: Manifest,
) -> None:
    running = Running(sample_manifest, prefill_tokens=4)
    for ticket in range(2):
        request = FakeRequest(endless(4, ticket), (), 7 - ticket)
        running.batch.submit(request.sequence(ticket))
        running.step()
    late = FakeRequest(prompt(40, 7), (), 3)
    running.batch.submit(late.sequence(2))
    running.finish()
    assert [slots for name, slots in running.slots.calls if name == "move"] == [(2, 0)]
    assert running.tokens(2) == late.alone().token_ids


def test_rows_that_end_together_are_not_moved_about(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=4, prefill_tokens=99, prefix_bytes=0)
    for ticket, limit in enumerate((3, 9, 3, 3)):
        running.batch.submit(FakeRequest(endless(4, ticket), (), limit).sequence(ticket))
    running.finish()
    assert [slots for name, slots in running.slots.calls if name == "move"] == [(1, 0)]


def test_cancelling_frees_at_once_wherever_a_request_is(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=2, prefill_tokens=4, prefix_bytes=0)
    lengths = (4, 4, 40, 4)  # decodes, decodes and stays, prompt is running, waits
    for ticket, length in enumerate(lengths):
        request = FakeRequest(endless(length, ticket), (), 30)
        running.batch.submit(request.sequence(ticket))
        if ticket < 2:
            running.step()
    running.batch.cancel(1)
    running.step()
    assert places(running) == (2, 1)
    assert running.slots.occupied == [0, 1]
    running.batch.cancel(0)
    assert running.slots.occupied == [1]
    running.batch.cancel(2)
    assert running.slots.occupied == []
    running.batch.cancel(3)
    assert places(running) == (0, 0)
    assert not running.batch.is_idle  # the events are still to be fetched
    running.finish()
    for ticket in range(4):
        assert isinstance(running.error(ticket), CancelledError)
    running.batch.cancel(0)
    assert running.batch.is_idle
    assert running.batch.step() == []


def test_late_requests_end_wherever_they_are(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=2, prefill_tokens=4, prefix_bytes=0)
    for ticket, length in enumerate((4, 40, 4)):
        request = FakeRequest(endless(length, ticket), (), 30)
        running.batch.submit(request.sequence(ticket, deadline=running.clock.now + 5))
        running.step()
    stays = FakeRequest(prompt(4, 9), (), 2)
    running.batch.submit(stays.sequence(3, deadline=running.clock.now + 50))
    assert places(running) == (2, 2)
    running.clock.now += 5
    running.finish()
    for ticket in range(3):
        assert isinstance(running.error(ticket), DeadlineError)
        assert "not answered within its time" in str(running.error(ticket))
    assert running.tokens(3) == stays.alone().token_ids
    errors = [running.error(ticket) for ticket in range(3)]
    assert len({id(error) for error in errors}) == 3  # each is raised in a place of its own


def test_nobody_passes_the_head_of_the_queue_because_he_is_smaller(
    sample_manifest: Manifest,
) -> None:
    running = Running(sample_manifest, cache_tokens=60, prefix_bytes=0)
    first = FakeRequest(endless(8), (), 12)
    large, small = FakeRequest(prompt(40, 3), (), 12), FakeRequest(prompt(2, 5), (), 2)
    running.batch.submit(first.sequence(0))
    running.batch.submit(large.sequence(1))  # 2 x 52 tokens are more than the cache holds
    running.batch.submit(small.sequence(2))
    running.step()
    assert places(running) == (1, 2)
    running.finish()
    assert running.order == [0, 1, 2]


def test_what_is_let_in_can_grow_to_its_end_beside_what_is_longer(
    sample_manifest: Manifest,
) -> None:
    """Each row takes as much as the longest one will."""
    running = Running(sample_manifest, cache_tokens=60, prefix_bytes=0)
    running.batch.submit(FakeRequest(endless(10), (), 25).sequence(0))
    running.batch.submit(FakeRequest(endless(4, 3), (), 4).sequence(1))
    running.step()
    assert places(running) == (1, 1)
    running.finish()
    assert len(running.tokens(0)) == 25
    assert len(running.tokens(1)) == 4


def test_smaller_priorities_come_first(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=1, prefix_bytes=0)
    for ticket, priority in enumerate((0, 5, 1, -1, 1)):
        request = FakeRequest(prompt(4, ticket), (), 2)
        running.batch.submit(request.sequence(ticket, priority=priority))
    running.finish()
    assert running.order == [3, 0, 2, 4, 1]


def test_a_full_queue_refuses_and_says_so(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=2, max_queue=1)
    request = FakeRequest(endless(4), (), 30)
    for ticket in range(3):
        running.batch.submit(request.sequence(ticket))
    with pytest.raises(QueueFullError, match=r"found 3 requests .* limit is 1 \(max_queue\)"):
        running.batch.submit(request.sequence(3))
    running.step()
    running.step()
    assert places(running) == (2, 1)
    with pytest.raises(QueueFullError, match=r"found 1 requests"):
        running.batch.submit(request.sequence(3))
    running.batch.cancel(0)
    running.batch.submit(request.sequence(3))
    running.finish()
    assert 3 in running.order


def test_without_a_queue_a_free_slot_is_enough(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=1, max_queue=0)
    request = FakeRequest(prompt(4), (), 3)
    running.batch.submit(request.sequence(0))
    with pytest.raises(QueueFullError):
        running.batch.submit(request.sequence(1))
    running.finish()
    running.batch.submit(request.sequence(1))
    running.finish()
    assert running.tokens(1) == running.tokens(0)


def test_a_request_that_never_fits_is_refused(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, cache_tokens=50)
    with pytest.raises(InputError, match=r"45 tokens of the prompt and up to 6 .* cache_tokens"):
        running.batch.submit(FakeRequest(prompt(45), (), 6).sequence(0))
    running.batch.submit(FakeRequest(prompt(45), (), 5).sequence(1))
    running.finish()
    assert running.error(1) is None


@pytest.mark.parametrize("value", [POISON, LATE_POISON])
def test_numbers_that_overflow_end_their_own_request_alone(
    sample_manifest: Manifest, value: float
) -> None:
    running = Running(sample_manifest)
    good = FakeRequest(prompt(20), (), 9)
    bad = FakeRequest((*prompt(LATE_LENGTH - 3), value), (), 30)
    for ticket, request in enumerate((good, bad, good, good, bad, good)):
        running.batch.submit(request.sequence(ticket))
    running.finish()
    for ticket in (0, 2, 3, 5):
        assert running.tokens(ticket) == good.alone().token_ids
    for ticket in (1, 4):
        assert "overflowed" in str(running.error(ticket))
        assert bool(running.tokens(ticket)) == (value == LATE_POISON)


def test_a_prompt_whose_numbers_overflow_ends_with_the_piece_that_shows_it(
    sample_manifest: Manifest,
) -> None:
    running = Running(sample_manifest, prefill_tokens=4)
    running.batch.submit(FakeRequest((*prompt(6), POISON, *prompt(20)), (), 4).sequence(0))
    running.step()
    assert running.events[0] == []
    running.step()
    assert "overflowed" in str(running.error(0))
    assert running.slots.prefilled == [4, 4]
    assert running.slots.occupied == []
    good = FakeRequest(prompt(6), (), 5)
    running.batch.submit(good.sequence(1))
    running.finish()
    assert running.tokens(1) == good.alone().token_ids


CALLS = ("prefill", "step", "move", "copy", "load", "save", "release")


@pytest.mark.parametrize("call", CALLS)
def test_what_the_backend_raises_ends_those_under_way_and_the_next_are_answered(
    sample_manifest: Manifest, call: str
) -> None:
    running = Running(sample_manifest, prefill_tokens=16)
    shared = prompt(17)
    requests = [FakeRequest((*shared, 1.0 + ticket), (), 3 + ticket) for ticket in range(6)]
    if call == "load":
        running.batch.submit(FakeRequest((*shared, 19.0), (), 2).sequence(99))
        running.finish()
    running.slots.failing[call] = 1
    for ticket, request in enumerate(requests):
        running.batch.submit(request.sequence(ticket))
    running.finish()
    failed = [ticket for ticket in range(6) if running.error(ticket) is not None]
    assert failed
    for ticket, request in enumerate(requests):
        assert running.events[ticket][-1].is_last
        alone = request.alone().token_ids
        assert running.tokens(ticket) == alone[: len(running.tokens(ticket))]
        if ticket in failed:
            assert f"RuntimeError: {call} failed" in str(running.error(ticket))
        else:
            assert running.tokens(ticket) == alone
    assert running.slots.occupied == []


def test_after_a_fault_every_slot_is_emptied(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=3)
    running.slots.failing = {"step": 1}
    running.batch.submit(FakeRequest(endless(4), (), 30).sequence(0))
    running.finish()
    assert "step failed" in str(running.error(0))
    released = [slots for name, slots in running.slots.calls if name == "release"]
    assert released == [(0,), (1,), (2,)]


def test_a_backend_that_is_broken_closes_the_batch_and_nobody_is_forgotten(
    sample_manifest: Manifest,
) -> None:
    running = Running(sample_manifest, num_slots=2)
    for ticket in range(5):
        request = FakeRequest(endless(4, ticket), (), 30)
        running.batch.submit(request.sequence(ticket))
    running.step()
    running.step()
    running.slots.failing = {"step": 1, "release": 9}
    running.finish()
    assert all(running.error(ticket) is not None for ticket in range(5))
    assert running.slots.is_closed
    assert running.batch.is_closed
    with pytest.raises(VlmportError, match="closed"):
        running.batch.submit(FakeRequest(prompt(4)).sequence(5))
    running.batch.cancel(0)
    assert running.batch.close() == []


def test_closing_ends_all(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=2)
    for ticket in range(4):
        request = FakeRequest(endless(4, ticket), (), 30)
        running.batch.submit(request.sequence(ticket))
    running.step()
    running.take(running.batch.close())
    assert all(isinstance(running.error(ticket), CancelledError) for ticket in range(4))
    assert running.slots.is_closed
    assert running.batch.is_idle
    assert running.batch.step() == []
    assert running.batch.close() == []
    with pytest.raises(VlmportError, match="service: closed"):
        running.batch.submit(FakeRequest(prompt(4)).sequence(9))


def test_counts_what_it_did(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, num_slots=2)
    request = FakeRequest(endless(20), (), 4)
    for ticket in range(2):
        running.batch.submit(request.sequence(ticket))
        running.finish()
    found = running.batch.statistics()
    assert (found.num_slots, found.num_active, found.num_waiting) == (2, 0, 0)
    assert (found.prefill_tokens, found.generated_tokens, found.num_steps) == (21, 8, 6)
    assert (found.prefix_hits, found.prefix_tokens, found.prefix_evictions) == (1, 19, 0)
    assert found.prefix_bytes == 230  # 20 tokens of the prompt and 3 of the answer
