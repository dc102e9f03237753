"""Sequences that join and leave on the CPU: slots of one cache, beside each sequence alone."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.device_scenarios import endless
from support.slot_scenarios import Question, alone, check_slots
from support.trained import exported, quantized
from tiny.recipes import RECIPES

from vlmport.errors import InputError
from vlmport.runtime.backends.onnxruntime_slots import OnnxRuntimeSlots
from vlmport.runtime.host_prompt import HostRows
from vlmport.runtime.slot_arena import slot_capacity

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.runtime import VisionLanguageModel
    from vlmport.runtime.backends.base import PromptEmbeddings

FAMILIES = sorted(RECIPES)
CAUSAL, BIDIRECTIONAL = "tinyllava", "paligemma"


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_answer_as_a_sequence_alone(family: str) -> None:
    model = endless(exported(family))
    check_slots(model, model, num_slots=6, cache_tokens=3000, texts=(1, 63, 64, 150, 700))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_of_lower_precision(family: str, tmp_path: Path) -> None:
    """As many bits as in float32 agree here; the limit is that of fp16 at another capacity."""
    halves = exported(family, "fp16")
    integers = quantized(family, exported(family), "int8", tmp_path / "int8")
    for bundle in (halves, integers):
        model = endless(bundle)
        check_slots(model, model, num_slots=6, cache_tokens=3000, atol=2e-2)


def prompt_of(model: VisionLanguageModel, length: int, seed: int = 0) -> PromptEmbeddings:
    ids = np.random.default_rng(seed).integers(5, 500, length)
    return model._backend.embed_prompt(ids, np.zeros(length, np.bool_), [])


def slots_of(
    model: VisionLanguageModel, num_slots: int = 3, cache_tokens: int = 600
) -> OnnxRuntimeSlots:
    found = model._backend.start_slots(num_slots, cache_tokens)
    assert isinstance(found, OnnxRuntimeSlots)
    return found


def asked(model: VisionLanguageModel, length: int, new_tokens: int, seed: int = 0) -> Question:
    prompt = prompt_of(model, length, seed)
    return Question(prompt, *alone(model, prompt.numpy(), new_tokens))


def test_a_sequence_grows_to_the_last_token_of_the_cache() -> None:
    """Past the steps of the capacity, beside a shorter one, until nothing is left."""
    model = endless(exported(CAUSAL))
    one, two = asked(model, 60, 143), asked(model, 5, 143, seed=1)
    with closing(slots_of(model, 2, 404)) as slots:
        logits = [
            slots.prefill(s, q.prompt, 0, len(q.prompt)).copy() for s, q in enumerate((one, two))
        ]
        capacities = {slots._arena.capacity}
        for step in range(142):
            for row, question in zip(logits, (one, two), strict=True):
                np.testing.assert_allclose(row, question.logits[step], rtol=0, atol=1e-5)
            tokens = np.array([one.token_ids[step], two.token_ids[step]])
            logits = [row.copy() for row in slots.step(tokens)]
            capacities.add(slots._arena.capacity)
        assert capacities == {64, 128, 192, 202}
        with pytest.raises(
            InputError,
            match=r"found 2 sequences of up to 203 tokens; .* and 404 \(cache_tokens\) together, "
            "202 for each",
        ):
            slots.step(np.array([1, 2]))
        # Nothing has changed: the shorter one leaves, and the longer one goes on.
        slots.release(1)
        row = slots.step(np.array([one.token_ids[142]]))[0]
        assert np.isfinite(row).all()


def test_the_capacity_follows_the_longest_sequence() -> None:
    model = endless(exported(CAUSAL))
    with closing(slots_of(model, 3, 3 * 1100)) as slots:
        kept = asked(model, 70, 4)
        slots.prefill(0, kept.prompt, 0, 70)
        assert slots._arena.capacity == 128
        slots.prefill(2, prompt_of(model, 1000), 0, 10)  # room for all of it at once
        assert slots._arena.capacity == 1024
        slots.release(2)
        row = slots.step(np.array(kept.token_ids[:1]))[0]
        assert slots._arena.capacity == 128
        np.testing.assert_allclose(row, kept.logits[1], rtol=0, atol=1e-5)


def test_capacities_are_near_and_few() -> None:
    found = [slot_capacity(length) for length in range(1, 20000)]
    lengths = np.arange(1, 20000)
    assert (np.array(found) >= lengths).all()
    assert (np.array(found) - lengths <= np.maximum(63, lengths // 8)).all()
    assert all(capacity % 64 == 0 for capacity in found)
    assert found == sorted(found)
    assert len(set(found)) < 60


def test_a_faulty_sequence_leaves_nothing_behind() -> None:
    """Attention multiplies rows that are not valid by 0, and 0 times infinity is NaN."""
    model = endless(exported(CAUSAL))
    question, length = asked(model, 40, 3), 90
    overflowed = prompt_of(model, length).numpy().copy()
    overflowed[50] = np.inf
    prompt = HostRows(overflowed)
    with closing(slots_of(model)) as slots:
        assert not np.isfinite(slots.prefill(1, prompt, 0, length)).all()
        neighbour = slots.prefill(0, question.prompt, 0, 40)
        np.testing.assert_allclose(neighbour, question.logits[0], rtol=0, atol=1e-5)
        slots.release(1, is_faulty=True)
        found = slots.prefill(1, question.prompt, 0, 40)
        np.testing.assert_allclose(found, question.logits[0], rtol=0, atol=1e-5)
        rows = slots.step(np.array([question.token_ids[0]] * 2))
        np.testing.assert_allclose(rows, question.logits[[1, 1]], rtol=0, atol=1e-5)


def test_a_prompt_that_sees_itself_runs_its_end_on_what_is_stored() -> None:
    model = endless(exported(BIDIRECTIONAL))
    question = asked(model, 50, 2)
    with closing(slots_of(model)) as slots:
        slots.prefill(0, question.prompt, 0, 50)
        stored = slots.save(0, 50)
        for start in (49, 48, 20):
            slots.load(1, stored, start)
            found = slots.prefill(1, question.prompt, start, 50)
            np.testing.assert_allclose(found, question.logits[0], rtol=0, atol=1e-5)
            rows = slots.step(np.array(question.token_ids[:1] * 2))
            np.testing.assert_allclose(rows[1], question.logits[1], rtol=0, atol=1e-5)
            slots.prefill(0, question.prompt, 49, 50)  # the step's token is forgotten
        with pytest.raises(AssertionError, match="is cut at 30"):
            slots.prefill(2, question.prompt, 0, 30)


def test_stored_tokens_are_a_copy_of_known_size() -> None:
    model = endless(exported(CAUSAL))
    question = asked(model, 30, 2)
    with closing(slots_of(model)) as slots:
        slots.prefill(0, question.prompt, 0, 30)
        stored = slots.save(0, 20)
        assert (len(stored), stored.num_bytes) == (20, 20 * slots.token_bytes)
        slots.release(0, is_faulty=True)
        slots.load(2, stored, 12)
        found = slots.prefill(2, question.prompt, 12, 30)
        np.testing.assert_allclose(found, question.logits[0], rtol=0, atol=1e-5)


def test_what_the_caller_must_not_do() -> None:
    model = endless(exported(CAUSAL))
    prompt = prompt_of(model, 30)
    with closing(slots_of(model)) as slots:
        with pytest.raises(AssertionError, match="slot 3 of 3"):
            slots.prefill(3, prompt, 0, 30)
        with pytest.raises(AssertionError, match="slot 0 lacks tokens in front of 5"):
            slots.prefill(0, prompt, 5, 30)
        with pytest.raises(AssertionError, match="one of the first 1 slots is empty"):
            slots.step(np.array([1]))
        slots.prefill(0, prompt, 0, 20)
        with pytest.raises(AssertionError, match="the prompt of one of the first 1 is cut short"):
            slots.step(np.array([1]))
        with pytest.raises(AssertionError, match="slot 1 is empty"):
            slots.move(1, 2)
        with pytest.raises(AssertionError):
            slots.copy(0, 1, 21)
        with pytest.raises(InputError, match=r"found 1 sequences of up to 700 tokens; .* 600"):
            slots.prefill(0, prompt_of(model, 700), 0, 10)
        # What does not fit has changed nothing.
        assert np.isfinite(slots.prefill(0, prompt, 20, 30)).all()
        assert slots.fits(3, 200)
        assert not slots.fits(3, 201)
        assert not slots.fits(4, 1)
        assert not slots.fits(1, model.manifest.dimensions.max_length + 1)


def test_more_memory_than_there_is() -> None:
    model = endless(exported(CAUSAL))
    with pytest.raises(InputError, match=r"cache: 1000000000000 tokens do not fit into the memory"):
        slots_of(model, 3, 10**12)
