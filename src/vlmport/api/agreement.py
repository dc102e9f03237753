"""How far one model's next tokens are from another's: definitions, step by step and in sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.api.signal_noise import decibels_of
from vlmport.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

__all__ = ["Agreement", "AnswerAgreement", "StepAgreement", "compare_step", "sum_agreement"]

_TOP = 5


@dataclass(frozen=True, slots=True)
class StepAgreement:
    """One next token, predicted by both models after the same tokens.

    Attributes:
        kl: Kullback-Leibler divergence of the tested model's distribution from the reference's, in
            nats; None if the tested model's logits hold NaN or Inf.
        is_top1_equal: whether both find the same token likeliest.
        top5_overlap: share of the reference's five likeliest tokens among the tested model's five.
        rank: place of the reference's likeliest token in the tested model's order; 1 is the first.
        logit_error: mean |difference| of the logits; None as `kl`.
        logit_signal: sum of the squares of the reference's logits less their mean, which changes no
            distribution.
        logit_noise: sum of the squares of the differences less their mean; None as `kl`.
    """

    kl: float | None
    is_top1_equal: bool
    top5_overlap: float
    rank: int
    logit_error: float | None
    logit_signal: float
    logit_noise: float | None


@dataclass(frozen=True, slots=True)
class AnswerAgreement:
    """One question, the tested model led along the reference's greedy answer.

    Attributes:
        question: for people.
        steps: one for each token of the reference's answer.
        reference_text: the reference's answer.
        text: what the tested model answers by itself.
    """

    question: str
    steps: tuple[StepAgreement, ...]
    reference_text: str
    text: str

    @property
    def first_difference(self) -> int | None:
        """The step at which the tested model, decoding greedily by itself, leaves the answer.

        Up to there both have the same tokens before them, so that the led model computes what the
        free one would. None if it never does.
        """
        pairs = enumerate(self.steps)
        return next((index for index, step in pairs if not step.is_top1_equal), None)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Sums over all next tokens of all questions.

    Attributes:
        questions: how many.
        steps: next tokens in all.
        nonfinite_steps: those at which the tested model's logits hold NaN or Inf.
        kl_mean: mean of `StepAgreement.kl`; None if there are `nonfinite_steps`, or no steps.
        kl_max: the largest, likewise.
        top1_agreement: share of the steps at which both find the same token likeliest.
        top5_overlap: mean of `StepAgreement.top5_overlap`.
        rank_mean: mean of `StepAgreement.rank`.
        rank_max: the largest.
        logit_error: mean of `StepAgreement.logit_error`, None as `kl_mean`.
        logits_snr_db: signal-to-noise ratio of all logits less each step's mean, in decibels; None
            if they are equal, or as `kl_mean`.
        answers_equal: share of the questions that both answer with the same tokens, each decoding
            greedily by itself.
        first_differences: for each question the step at which the answers part, None if nowhere.
    """

    questions: int
    steps: int
    nonfinite_steps: int
    kl_mean: float | None
    kl_max: float | None
    top1_agreement: float
    top5_overlap: float
    rank_mean: float
    rank_max: int
    logit_error: float | None
    logits_snr_db: float | None
    answers_equal: float
    first_differences: tuple[int | None, ...]

    @property
    def top1_lost_percent(self) -> float:
        """Steps, in percent, at which another token is likeliest than the reference's."""
        return 100.0 * (1.0 - self.top1_agreement)


def compare_step(
    found: NDArray[np.float32], reference: NDArray[np.float32], suppressed: Sequence[int]
) -> StepAgreement:
    """Compares two next-token distributions in float64.

    Args:
        found: float32 [vocab_size], logits of the tested model.
        reference: float32 [vocab_size], logits of the reference.
        suppressed: tokens that are never chosen; they take no part in either distribution.

    Raises:
        ParityError: if the shapes differ, or the reference holds NaN or Inf.

    Source: Kullback and Leibler 1951, "On Information and Sufficiency"; with P the reference's
        softmax and Q the tested model's, sum over tokens of P (log P - log Q).
    """
    if found.shape != reference.shape:
        msg = (
            f"logits: found shape {list(found.shape)}; the reference has {list(reference.shape)}; "
            "compare models of one vocabulary"
        )
        raise ParityError(msg)
    allowed = np.ones(found.shape, np.bool_)
    allowed[list(suppressed)] = False
    ours, theirs = found[allowed].astype(np.float64), reference[allowed].astype(np.float64)
    if not np.isfinite(theirs).all():
        msg = "logits: the reference itself holds NaN or Inf; expected finite ones; check its model"
        raise ParityError(msg)
    if not np.isfinite(ours).all():
        # It predicts nothing: as wrong as can be.
        return StepAgreement(None, False, 0.0, ours.size, None, _power(theirs), None)
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    choice = int(theirs.argmax())
    top = min(_TOP, ours.size)
    both = np.intersect1d(_largest(ours, top), _largest(theirs, top))
    return StepAgreement(
        # The sum of tiny terms of both signs may round to just below zero.
        kl=max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q)))),
        is_top1_equal=int(ours.argmax()) == choice,
        top5_overlap=len(both) / top,
        rank=1 + int(np.count_nonzero(ours > ours[choice])),
        logit_error=float(np.abs(ours - theirs).mean()),
        logit_signal=_power(theirs),
        logit_noise=_power(ours - theirs),
    )


def sum_agreement(answers: Iterable[AnswerAgreement]) -> Agreement:
    """Sums up any number of answers, one after the other.

    Raises:
        ParityError: if there is no step at all.
    """
    sums = _Sums()
    for answer in answers:
        sums.add(answer)
    if not sums.steps:
        msg = "agreement: found no token to compare; expected a question that the reference answers"
        raise ParityError(msg)
    count, finite = sums.steps, not sums.nonfinite_steps
    return Agreement(
        questions=len(sums.first_differences),
        steps=count,
        nonfinite_steps=sums.nonfinite_steps,
        kl_mean=sums.kl / count if finite else None,
        kl_max=sums.kl_max if finite else None,
        top1_agreement=sums.top1 / count,
        top5_overlap=sums.top5 / count,
        rank_mean=sums.rank / count,
        rank_max=sums.rank_max,
        logit_error=sums.logit_error / count if finite else None,
        logits_snr_db=decibels_of(sums.signal, sums.noise) if finite else None,
        answers_equal=sums.first_differences.count(None) / len(sums.first_differences),
        first_differences=tuple(sums.first_differences),
    )


class _Sums:
    def __init__(self) -> None:
        self.steps = self.nonfinite_steps = self.top1 = self.rank = self.rank_max = 0
        self.kl = self.kl_max = self.top5 = self.logit_error = self.signal = self.noise = 0.0
        self.first_differences: list[int | None] = []

    def add(self, answer: AnswerAgreement) -> None:
        for step in answer.steps:
            self.steps += 1
            self.top1 += step.is_top1_equal
            self.top5 += step.top5_overlap
            self.rank += step.rank
            self.rank_max = max(self.rank_max, step.rank)
            if step.kl is None or step.logit_error is None or step.logit_noise is None:
                self.nonfinite_steps += 1
                continue
            self.kl += step.kl
            self.kl_max = max(self.kl_max, step.kl)
            self.logit_error += step.logit_error
            self.signal += step.logit_signal
            self.noise += step.logit_noise
        self.first_differences.append(answer.first_difference)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _power(logits: NDArray[np.float64]) -> float:
    return float(np.square(logits - logits.mean()).sum())


def _largest(logits: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    indices: NDArray[np.intp] = np.argpartition(logits, -count)[-count:]
    return indices
