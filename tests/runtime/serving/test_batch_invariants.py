"""Whatever happens in whatever order: no slot is lost, no row mixed up, nobody forgotten."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.fake_requests import FakeRequest
from support.fake_slots import LATE_POISON, POISON, Costs, FakeSlots
from support.running_batch import Running, endless, prompt

from vlmport.contract import Manifest
from vlmport.errors import InputError, QueueFullError
from vlmport.runtime.generate import Row
from vlmport.runtime.sampling import SamplingOptions
from vlmport.runtime.serving.sequence import Sequence

CALLS = ("prefill", "step", "move", "copy", "load", "save", "release")
NUM_SLOTS, CACHE_TOKENS, PREFIX_BYTES = 4, 150, 900  # three of the longest fit, not four
COSTS = Costs(call=0.004, prompt_token=0.0005, step=0.03, copied_token=0.001)
BEGINNINGS = (
    prompt(3),
    prompt(19),
    endless(18, 4),
    (1.0, 2.0, *[-1.0] * 15, 3.0),
    (1.0, *[-1.0] * 9, 2.0, *[-2.0] * 9),
)
SAMPLING = (
    SamplingOptions(),
    SamplingOptions(temperature=1.0, seed=3),
    SamplingOptions(temperature=0.8, top_k=5, repetition_penalty=1.3, seed=4),
)
REQUESTS = st.builds(
    lambda beginning, end, images, limit, sampling, stop: FakeRequest(
        (*beginning, *end), images, limit, sampling, stop
    ),
    st.sampled_from(BEGINNINGS),
    st.lists(st.sampled_from((1.0, 2.0, 3.0)), max_size=3).map(tuple),
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
    st.integers(1, 25),
    st.sampled_from(SAMPLING),
    st.sampled_from(("", "07", "1811")),
)


@functools.lru_cache(maxsize=4096)
def alone(request: FakeRequest, sees_whole_prompt: bool) -> Row:
    return request.alone(sees_whole_prompt=sees_whole_prompt)


class BatchMachine(RuleBasedStateMachine):
    """What may happen to a batch; `manifest` and `sees_whole_prompt` are set by the test."""

    manifest: Manifest
    sees_whole_prompt: bool

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[int, FakeRequest] = {}
        self.sequences: dict[int, Sequence] = {}

    @initialize(prefill_tokens=st.sampled_from((None, 5, 40)), max_queue=st.integers(0, 6))
    def start(self, prefill_tokens: int | None, max_queue: int) -> None:
        self.max_queue = max_queue
        self.running = Running(
            self.manifest,
            num_slots=NUM_SLOTS,
            cache_tokens=CACHE_TOKENS,
            sees_whole_prompt=self.sees_whole_prompt,
            costs=COSTS,
            max_queue=max_queue,
            prefill_tokens=prefill_tokens,
            prefix_bytes=PREFIX_BYTES,
        )

    @rule(
        request=REQUESTS,
        priority=st.sampled_from((0, 0, 0, 1, -1)),
        seconds=st.sampled_from((None, None, 0.0, 0.2, 1.0)),
    )
    def submit(self, request: FakeRequest, priority: int, seconds: float | None) -> None:
        ticket = len(self.asked)
        deadline = None if seconds is None else self.running.clock.now + seconds
        sequence = request.sequence(ticket, priority=priority, deadline=deadline)
        found = self.running.batch.statistics()
        if found.num_active + found.num_waiting >= NUM_SLOTS + self.max_queue:
            with pytest.raises(QueueFullError):
                self.running.batch.submit(sequence)
            return
        self.running.batch.submit(sequence)
        self.asked[ticket] = request
        self.sequences[ticket] = sequence

    @rule(value=st.sampled_from((POISON, LATE_POISON)), length=st.integers(1, 20))
    def submit_what_overflows(self, value: float, length: int) -> None:
        self.submit(FakeRequest((*prompt(length), value), (), 20), 0, None)

    @rule()
    def submit_what_never_fits(self) -> None:
        with pytest.raises(InputError):
            self.running.batch.submit(FakeRequest(prompt(CACHE_TOKENS), (), 1).sequence(10**6))

    @rule(data=st.data())
    @precondition(lambda self: self.asked)
    def go_on_with_a_chat(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.asked)))
        request, said = self.asked[ticket], self.running.tokens(ticket)
        tokens = (*request.tokens, *map(float, said), 5.0)
        if len(tokens) < 60:
            self.submit(FakeRequest(tokens, request.images, 8), 0, None)

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.running.step()
            self.check_slots()

    @rule(data=st.data())
    @precondition(lambda self: self.asked)
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.asked)))
        self.running.batch.cancel(ticket)
        self.check_slots()

    @rule(call=st.sampled_from(CALLS))
    def let_a_call_fail(self, call: str) -> None:
        self.running.slots.failing = {call: 1}  # one at a time: the batch goes on after that

    @rule(seconds=st.sampled_from((0.01, 0.5)))
    def wait(self, seconds: float) -> None:
        self.running.clock.now += seconds

    @invariant()
    @precondition(lambda self: hasattr(self, "running"))
    def memory_is_bounded(self) -> None:
        found = self.running.batch.statistics()
        assert found.prefix_bytes <= PREFIX_BYTES
        assert found.num_active + found.num_waiting <= NUM_SLOTS + self.max_queue
        assert found.num_active <= NUM_SLOTS

    @invariant()
    def answers_are_what_they_are_alone(self) -> None:
        for ticket, request in self.asked.items():
            row = alone(request, self.sees_whole_prompt)
            found = self.running.tokens(ticket)
            assert found == row.token_ids[: len(found)], ticket
            if self.has_ended(ticket) and self.running.error(ticket) is None:
                assert row.finish_reason is not None
                assert found == row.token_ids
                assert self.running.text(ticket) == row.stream.text()

    @invariant()
    def who_came_first_is_not_overtaken_by_the_less_urgent(self) -> None:
        place = {ticket: index for index, ticket in enumerate(self.running_order())}
        for ticket, sequence in self.sequences.items():
            for other in range(ticket):
                if other in self.sequences and self.sequences[other].priority <= sequence.priority:
                    was_told = other in place or self.has_ended(other)
                    assert ticket not in place or was_told, (other, ticket)
                    if other in place and ticket in place:
                        assert place[other] < place[ticket]

    def teardown(self) -> None:
        if not hasattr(self, "running"):
            return
        steps = 0
        while not self.running.batch.is_idle:
            self.running.step()
            steps += 1
            assert steps < 3000, "the batch does not get on"
        for ticket in self.asked:
            assert [event.is_last for event in self.running.events[ticket]].count(True) == 1
        self.answers_are_what_they_are_alone()
        assert self.running.slots.occupied == []
        self.running.batch.close()

    def running_order(self) -> list[int]:
        return self.running.order if hasattr(self, "running") else []

    def has_ended(self, ticket: int) -> bool:
        events = self.running.events[ticket]
        return bool(events) and events[-1].is_last

    def check_slots(self) -> None:
        """Who has a slot holds something, who has none does not; all can grow to their end."""
        slots: FakeSlots = self.running.slots
        batch = self.running.batch
        active = batch._active()
        assert len(slots.occupied) == len(active) == batch.statistics().num_active
        assert sorted(one.slot for one in active) == slots.occupied
        assert [one.slot for one in batch._rows] == list(range(len(batch._rows)))
        longest = max((one.sequence.reservation for one in active), default=0)
        assert slots.fits(len(active), longest)
        for one in active:
            assert one.length == len(slots.slots[one.slot])


@pytest.mark.parametrize("sees_whole_prompt", [False, True])
def test_invariants(sample_manifest: Manifest, sees_whole_prompt: bool) -> None:
    check_invariants(sample_manifest, sees_whole_prompt, examples=40)


@pytest.mark.slow
@pytest.mark.parametrize("sees_whole_prompt", [False, True])
def test_invariants_at_length(sample_manifest: Manifest, sees_whole_prompt: bool) -> None:
    check_invariants(sample_manifest, sees_whole_prompt, examples=1500)


def check_invariants(manifest: Manifest, sees_whole_prompt: bool, examples: int) -> None:
    attributes: dict[str, Any] = {
        "manifest": manifest,
        "sees_whole_prompt": sees_whole_prompt,
    }
    machine: type[BatchMachine] = type("Machine", (BatchMachine,), attributes)
    budget = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(machine, settings=budget)
