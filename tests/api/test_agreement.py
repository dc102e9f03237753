from __future__ import annotations

import numpy as np
import pytest

from vlmport.api.agreement import AnswerAgreement, compare_step, sum_agreement
from vlmport.errors import ParityError


def logits(seed: int, size: int = 50) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 4, size).astype(np.float32)


def answer(*steps: tuple[int, int]) -> AnswerAgreement:
    pairs = [compare_step(logits(ours), logits(theirs), ()) for ours, theirs in steps]
    return AnswerAgreement("why", tuple(pairs), "this", "that")


def test_divergence_equals_its_definition() -> None:
    ours, theirs = logits(1), logits(2)
    p, q = (
        np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (theirs, ours)
    )
    step = compare_step(ours, theirs, ())
    assert step.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-12)
    assert step.logit_error == pytest.approx(float(np.abs(p * 0 + ours - theirs).mean()), rel=1e-6)


def test_a_shift_of_all_logits_changes_no_distribution() -> None:
    step = compare_step(logits(1) + np.float32(8), logits(1), ())
    assert step.kl == pytest.approx(0.0, abs=1e-12)
    assert step.logit_noise == pytest.approx(0.0, abs=1e-9)
    assert step.is_top1_equal
    assert step.rank == 1


def test_huge_logits_do_not_overflow() -> None:
    step = compare_step(logits(1) * np.float32(1e30), logits(1) * np.float32(1e30), ())
    assert step.kl == 0.0


def test_rank_and_overlap_count_tokens() -> None:
    theirs = np.array([9, 8, 7, 6, 5, 1, 0], np.float32)
    ours = np.array([3, 8, 7, 6, 1, 2, 4], np.float32)
    step = compare_step(ours, theirs, ())
    assert not step.is_top1_equal
    assert step.rank == 5  # behind 8, 7, 6 and 4
    assert step.top5_overlap == pytest.approx(4 / 5)


def test_suppressed_tokens_take_no_part() -> None:
    ours, theirs = logits(1), logits(1)
    theirs[3], ours[3] = -np.inf, 1000.0
    assert compare_step(ours, theirs, (3,)).kl == 0.0
    assert compare_step(ours, theirs, (3,)).is_top1_equal


def test_a_model_that_gives_nan_agrees_in_nothing() -> None:
    broken = logits(1)
    broken[0] = np.nan
    led = AnswerAgreement("why", (compare_step(broken, logits(1), ()),), "", "")
    total = sum_agreement([led, answer((1, 1))])
    assert total.nonfinite_steps == 1
    assert total.kl_mean is None
    assert total.logits_snr_db is None
    assert total.top1_agreement == 0.5
    assert total.answers_equal == 0.5


def test_a_reference_that_gives_nan_is_an_error() -> None:
    broken = logits(1)
    broken[0] = np.nan
    with pytest.raises(ParityError, match="the reference itself holds NaN"):
        compare_step(logits(1), broken, ())


def test_models_of_different_vocabularies_are_an_error() -> None:
    with pytest.raises(ParityError, match=r"shape \[50\]; the reference has \[49\]"):
        compare_step(logits(1), logits(1, 49), ())


def test_sums_are_over_steps_not_over_answers() -> None:
    one, three = answer((1, 2)), answer((3, 3), (4, 4), (5, 6))
    total = sum_agreement([one, three])
    steps = [*one.steps, *three.steps]
    assert total.steps == 4
    assert total.kl_mean == pytest.approx(
        np.mean([step.kl for step in steps if step.kl is not None])
    )
    assert total.kl_max == max(step.kl or 0.0 for step in steps)
    noise = sum(step.logit_noise or 0.0 for step in steps)
    signal = sum(step.logit_signal for step in steps)
    assert total.logits_snr_db == pytest.approx(10 * np.log10(signal / noise))
    assert total.first_differences == (0, 2)
    assert total.top1_lost_percent == pytest.approx(100 * (1 - total.top1_agreement))


def test_no_token_is_an_error() -> None:
    with pytest.raises(ParityError, match="found no token to compare"):
        sum_agreement([])
