from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmport.errors import InputError, VlmportError
from vlmport.runtime.sampling import SamplingOptions, TokenSampler, filtered_logits

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCAB = 500


def random_logits(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=3, size=VOCAB).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0.7),
        SamplingOptions(temperature=1.3, top_k=7),
        SamplingOptions(temperature=1.0, top_p=0.8),
        SamplingOptions(temperature=1.0, min_p=0.05),
        SamplingOptions(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
        SamplingOptions(temperature=1.0, top_k=VOCAB + 5),
        SamplingOptions(temperature=1.0, top_p=1e-6),
    ],
)
def test_kept_tokens_are_those_of_transformers(options: SamplingOptions, seed: int) -> None:
    logits = random_logits(seed)
    warpers: list[Any] = [TemperatureLogitsWarper(options.temperature)]
    warpers += [TopKLogitsWarper(options.top_k)] if options.top_k else []
    warpers += [TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
    warpers += [MinPLogitsWarper(options.min_p)] if options.min_p else []
    scores = torch.from_numpy(logits)[None]
    for warper in warpers:
        scores = warper(torch.zeros((1, 0), dtype=torch.long), scores)
    expected = scores[0].numpy()
    kept, values = filtered_logits(logits, options)
    np.testing.assert_array_equal(kept, np.flatnonzero(np.isfinite(expected)))
    np.testing.assert_allclose(values, expected[kept], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 50, 1024, 9999, 20000])
@pytest.mark.parametrize("digits", [0, 3, 7])
def test_of_many_tokens_the_highest_are_kept_with_their_ties(count: int, digits: int) -> None:
    generator = np.random.default_rng(count + digits)
    logits = generator.normal(scale=3, size=20000).round(digits).astype(np.float32)
    kept, _ = filtered_logits(logits, SamplingOptions(temperature=1.0, top_k=count))
    threshold = np.sort(logits)[-count]
    np.testing.assert_array_equal(kept, np.flatnonzero(logits >= threshold))


def test_repetition_penalty_is_that_of_transformers() -> None:
    prompt, answer = np.array([3, 5, 5, 9]), [11, 3]
    logits = random_logits(0)
    sampler = TokenSampler(SamplingOptions(repetition_penalty=1.7), VOCAB)
    sampler.start(prompt)
    for token in answer:
        forced = np.full(VOCAB, -1e9, np.float32)
        forced[token] = 1e9
        assert sampler.select(forced) == token
    history: Any = torch.tensor([[*prompt.tolist(), *answer]])
    processor: Any = RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(history, torch.from_numpy(logits)[None])
    assert sampler.select(logits) == int(expected.argmax())
    np.testing.assert_allclose(sampler._penalised(logits)[:12], expected[0, :12], rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_penalty_of_a_suppressed_token_does_not_warn() -> None:
    sampler = TokenSampler(SamplingOptions(repetition_penalty=1.7), 3)
    sampler.start(np.array([0, 1]))
    logits = np.array([np.finfo(np.float32).min, 1, 2], np.float32)
    assert sampler.select(logits) == 2


def test_frequency_and_presence_penalties_count_the_answer_alone() -> None:
    options = SamplingOptions(frequency_penalty=0.5, presence_penalty=1.0)
    sampler = TokenSampler(options, 4)
    sampler.start(np.array([1]))
    logits = np.array([0.0, 3.0, 2.6, 0.0], np.float32)
    # 3.0, then 3.0 - 1.5 < 2.6, then 2.6 - 1.5 < 1.5, then 3.0 - 2.0 < 1.1, then 2.6 - 2.0 < 1.0
    assert [sampler.select(logits) for _ in range(5)] == [1, 2, 1, 2, 1]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def draws(seed: int) -> list[int]:
        sampler = TokenSampler(SamplingOptions(temperature=1.0, seed=seed), 4)
        return [sampler.select(logits) for _ in range(20000)]

    counts = np.bincount(draws(1), minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.012)
    assert draws(1)[:50] == draws(1)[:50] != draws(2)[:50]


@pytest.mark.parametrize(("scale", "top_p"), [(0.1, 0.99), (1.0, 0.5), (3.0, 0.95)])
def test_nucleus_beyond_the_first_candidates_is_that_of_transformers(
    scale: float, top_p: float
) -> None:
    logits = (np.random.default_rng(0).normal(size=20000) * scale).astype(np.float32)
    warper: Any = TopPLogitsWarper(top_p)
    scores = warper(torch.zeros((1, 0), dtype=torch.long), torch.from_numpy(logits)[None])
    expected = int(torch.isfinite(scores).sum())
    kept, _ = filtered_logits(logits, SamplingOptions(temperature=1.0, top_p=top_p))
    # transformers sums 20000 float32 probabilities, which moves the border by a few tokens.
    assert abs(len(kept) - expected) <= 0.002 * expected
    assert logits[kept].min() >= np.partition(logits, -len(kept))[-len(kept)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-37])
@pytest.mark.parametrize("shift", [-9.0, -2.0, 0.0, 9.0])
def test_temperature_near_zero_is_greedy(temperature: float, shift: float) -> None:
    sampler = TokenSampler(SamplingOptions(temperature=temperature, seed=0), 4)
    logits = np.array([0, 2, 1, -1], np.float32) + np.float32(shift)
    assert [sampler.select(logits) for _ in range(5)] == [1] * 5


def test_requests_draw_the_same_alone_and_beside_others() -> None:
    logits = random_logits(0)
    options = SamplingOptions(temperature=1.0, seed=7)
    alone = TokenSampler(options, VOCAB)
    expected = [alone.select(logits) for _ in range(20)]
    first, second = TokenSampler(options, VOCAB), TokenSampler(SamplingOptions(1.0), VOCAB)
    found = []
    for _ in range(20):
        found.append(first.select(logits))
        second.select(logits)
    assert found == expected


def test_draws_are_those_that_select_decides_by() -> None:
    logits = np.log(np.full(4, 0.25, np.float32))
    options = SamplingOptions(temperature=1.0, seed=5)
    selecting, drawing = TokenSampler(options, 4), TokenSampler(options, 4)
    for _ in range(50):
        assert selecting.select(logits) == int(4 * drawing.draw())


def test_greedy_draws_nothing() -> None:
    sampler = TokenSampler(SamplingOptions(seed=5), 4)
    assert sampler.is_greedy
    assert [sampler.draw() for _ in range(3)] == [0.0, 0.0, 0.0]


def test_seen_tokens_are_shown_and_kept() -> None:
    sampler = TokenSampler(SamplingOptions(), 4)
    sampler.start(np.array([2]))
    assert sampler.seen.tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="read-only"):
        sampler.seen[0] = True


def test_greedy_takes_the_first_of_equal_logits() -> None:
    sampler = TokenSampler(SamplingOptions(), 4)
    assert sampler.select(np.array([1, 2, 2, 0], np.float32)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_none_are_reported(bad: float, temperature: float) -> None:
    sampler = TokenSampler(SamplingOptions(temperature=temperature), 3)
    with pytest.raises(VlmportError, match="overflowed"):
        sampler.select(np.array([1, bad, 2], np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("frequency_penalty", 3.0),
        ("presence_penalty", float("nan")),
        ("seed", -1),
        ("seed", 1.5),
        ("top_k", 1.5),
        ("top_k", True),
        ("temperature", "hot"),
        ("min_p", None),
    ],
)
def test_values_outside_their_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}: found {value}; expected"):
        SamplingOptions(**{name: value})


def test_all_wrong_values_are_listed_at_once() -> None:
    with pytest.raises(InputError, match=r"top_p: .*; min_p: "):
        SamplingOptions(top_p=2.0, min_p=2.0)
