from __future__ import annotations

from dataclasses import replace

import pytest
from support.fake_requests import FakeRequest
from support.fake_slots import NEVER_ENDS, TOKEN_BYTES
from support.running_batch import Running, prompt

from vlmport.contract import Manifest
from vlmport.errors import EngineError

PICTURE = (NEVER_ENDS, 2.0, *[-1.0] * 20, 3.0)


def answered(running: Running, ticket: int, request: FakeRequest, *, whole: bool = False) -> int:
    """Answers a request alone in the batch, checks it, and says how many prompt tokens ran."""
    before = sum(running.slots.prefilled)
    running.batch.submit(request.sequence(ticket))
    running.finish()
    assert running.tokens(ticket) == request.alone(sees_whole_prompt=whole).token_ids
    return sum(running.slots.prefilled) - before


def names(running: Running) -> list[str]:
    return [name for name, _ in running.slots.calls if name in {"copy", "load", "save"}]


def test_a_prompt_begins_where_it_differs_from_one_that_has_ended(
    sample_manifest: Manifest,
) -> None:
    running = Running(sample_manifest)
    assert answered(running, 0, FakeRequest((*PICTURE, 5.0, 6.0), (4,))) == 25
    assert answered(running, 1, FakeRequest((*PICTURE, 7.0, 8.0, 9.0), (4,))) == 3
    # Another picture: two tokens in common are not worth it.
    assert answered(running, 2, FakeRequest((*PICTURE, 5.0, 6.0), (5,))) == 25
    assert names(running).count("load") == 1


def test_the_last_token_always_runs(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest)
    request = FakeRequest((*PICTURE, 5.0), (4,))
    assert answered(running, 0, request) == 24
    assert answered(running, 1, request) == 1


def test_a_chat_goes_on_behind_its_own_answer(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest)
    first = FakeRequest((*PICTURE, 5.0), (4,), 9)
    answered(running, 0, first)
    said = tuple(float(token) for token in running.tokens(0))
    assert len(said) == 9
    # The last token of an answer has no keys and values: it runs with the next turn.
    assert answered(running, 1, FakeRequest((*first.tokens, *said, 6.0, 7.0), (4,))) == 3
    # The first turn is the beginning of what is stored now, and no longer stored for itself.
    assert running.batch.statistics().prefix_bytes == TOKEN_BYTES * (
        len(first.tokens) + 9 + 2 + len(running.tokens(1)) - 1
    )


def test_a_prompt_begins_with_what_is_in_another_slot(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, prefix_bytes=0)
    requests = [FakeRequest((*PICTURE, 5.0 + n), (4,), 9) for n in range(3)]
    for ticket, request in enumerate(requests):
        running.batch.submit(request.sequence(ticket))
    running.finish()
    assert sum(running.slots.prefilled) == 24 + 1 + 1
    assert names(running) == ["copy", "copy"]
    for ticket, request in enumerate(requests):
        assert running.tokens(ticket) == request.alone().token_ids


def test_the_longer_one_of_a_slot_and_of_the_store_is_taken(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest)
    answered(running, 0, FakeRequest((*PICTURE, *prompt(9)), (4,)))
    live = FakeRequest((*PICTURE, *prompt(4), 19.0), (4,), 20)
    running.batch.submit(live.sequence(1))
    running.step()
    request = FakeRequest((*PICTURE, *prompt(8), 18.0), (4,), 2)
    running.batch.submit(request.sequence(2))
    before = sum(running.slots.prefilled)
    running.step()
    running.step()
    assert sum(running.slots.prefilled) - before == 1
    request = FakeRequest((*PICTURE, *prompt(4), 19.0, 17.0), (4,), 2)
    running.batch.submit(request.sequence(3))
    running.finish()
    assert sum(running.slots.prefilled) - before == 2
    assert names(running)[:5] == ["save", "load", "load", "save", "copy"]


def test_what_is_stored_or_still_in_a_slot_is_not_stored_again(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest)
    request = FakeRequest((*PICTURE, 5.0), (4,), 6)
    for ticket, limit in enumerate((4, 2, 6, 6)):  # the short ones begin as the others do
        running.batch.submit(replace(request, max_new_tokens=limit).sequence(ticket))
    running.finish()
    answered(running, 9, request)
    assert names(running).count("save") == 1


def test_nothing_is_stored_without_memory_for_it(sample_manifest: Manifest) -> None:
    running = Running(sample_manifest, prefix_bytes=0)
    request = FakeRequest((*PICTURE, 5.0), (4,), 6)
    assert answered(running, 0, request) == answered(running, 1, request) == 24
    assert names(running) == []


@pytest.mark.parametrize("kind", [EngineError, MemoryError])
def test_what_no_memory_is_left_for_is_not_stored_and_harms_nobody(
    sample_manifest: Manifest,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = Running(sample_manifest)
    other = FakeRequest((*PICTURE, 9.0), (5,), 20)
    running.batch.submit(other.sequence(9))
    running.step()

    def refuse(*_: object) -> None:
        raise kind("no memory is left")

    request = FakeRequest((*PICTURE, 5.0), (4,), 3)
    with monkeypatch.context() as patched:
        patched.setattr(running.slots, "save", refuse)
        assert answered(running, 0, request) == 24
    assert running.tokens(9) == other.alone().token_ids
    assert "prefix: 26 tokens are not kept for later prompts (no memory is left)" in caplog.text
    assert running.batch.statistics().prefix_bytes == 0
    assert answered(running, 1, request) == 24
    assert answered(running, 2, request) == 1


@pytest.mark.parametrize("is_live", [False, True])
def test_where_a_prompt_sees_all_of_itself_only_a_whole_one_is_found(
    sample_manifest: Manifest, is_live: bool
) -> None:
    running = Running(sample_manifest, sees_whole_prompt=True, prefix_bytes=9000)
    first = FakeRequest((*PICTURE, 5.0, 6.0), (4,), 20)
    running.batch.submit(first.sequence(0))
    running.step()
    if not is_live:
        running.finish()
    said = tuple(float(token) for token in running.tokens(0))
    others = [
        FakeRequest((*PICTURE, 5.0, 7.0), (4,), 3),
        FakeRequest((*PICTURE, 5.0), (4,), 3),
        FakeRequest((*first.tokens, *said), (4,), 3),
        FakeRequest(first.tokens, (5,), 3),
    ]
    for ticket, request in enumerate(others, 1):
        before = sum(running.slots.prefilled)
        running.batch.submit(request.sequence(ticket))
        while not running.events[ticket] or not running.events[ticket][-1].is_last:
            running.step()
        assert sum(running.slots.prefilled) - before == len(request.tokens)
        alone = request.alone(sees_whole_prompt=True)
        assert running.tokens(ticket) == alone.token_ids
    before = sum(running.slots.prefilled)
    same = FakeRequest(first.tokens, (4,), 7)
    running.batch.submit(same.sequence(9))
    running.finish()
    assert sum(running.slots.prefilled) - before == 1
    assert running.tokens(9) == same.alone(sees_whole_prompt=True).token_ids
    assert running.tokens(0) == first.alone(sees_whole_prompt=True).token_ids


def test_prompts_that_only_begin_alike_are_stored_side_by_side_where_they_see_all(
    sample_manifest: Manifest,
) -> None:
    running = Running(sample_manifest, sees_whole_prompt=True)
    short = FakeRequest(prompt(18), (), 3)
    long = FakeRequest(prompt(20), (), 3)
    for ticket, request in enumerate((short, long)):
        answered(running, ticket, request, whole=True)
    assert answered(running, 2, short, whole=True) == 1
    assert answered(running, 3, long, whole=True) == 1


def test_a_request_that_was_taken_back_leaves_what_it_had_answered(
    sample_manifest: Manifest,
) -> None:
    """A chat goes on behind an answer that its reader has stopped."""
    running = Running(sample_manifest)
    first = FakeRequest((*PICTURE, 5.0), (4,), 20)
    running.batch.submit(first.sequence(0))
    for _ in range(6):
        running.step()
    running.batch.cancel(0)
    running.finish()
    said = tuple(float(token) for token in running.tokens(0))
    assert len(said) == 6
    assert answered(running, 1, FakeRequest((*first.tokens, *said, 7.0), (4,))) == 2
