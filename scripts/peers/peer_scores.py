"""Asks every contender's bundle the same questions and holds it against the float bundle."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peers.peer_graph import decoder_bytes
from vlmport.api.evaluate import EvaluateOptions, evaluate
from vlmport.api.progress import SilentProgress
from vlmport.api.questions import read_questions
from vlmport.api.reference_answers import ask_reference, measure_agreement
from vlmport.runtime import Request, VisionLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

    from peers.contenders import Contender
    from vlmport.api.evaluation import BundleScores

__all__ = ["FLOAT", "Referee", "Score"]

FLOAT = "float32"
_LONGEST_MESSAGE = 160


@dataclass(frozen=True, slots=True)
class Score:
    """One contender on one checkpoint.

    Attributes:
        checkpoint: its name.
        group: of the contender; `FLOAT` for the float bundle.
        contender: its name.
        is_ours: whether the group's others are held against it.
        failure: what a peer said that could not do it; "" if it could. Then the rest is None.
        questions: how many were asked.
        exact: share of exact answers.
        right: for each question whether the answer was right.
        decoder_share: bytes of the decoder's weights over those in float32.
        kl_mean: mean divergence of next tokens from the float bundle's, nats.
        top1: share of next tokens at which both find the same likeliest.
        steps: next tokens compared.
    """

    checkpoint: str
    group: str
    contender: str
    is_ours: bool = False
    failure: str = ""
    questions: int | None = None
    exact: float | None = None
    right: list[bool] | None = None
    decoder_share: float | None = None
    kl_mean: float | None = None
    top1: float | None = None
    steps: int | None = None


class Referee:
    """Scores bundles of one checkpoint.

    Args:
        folder: with the float bundle as "fp32"; also gets the float bundle's logits.
        data: questions.
        led: on how many of them next tokens are compared.
    """

    def __init__(self, folder: Path, data: Path, led: int) -> None:
        self._base = folder / "fp32"
        self._data = data
        requests = [
            Request(prompt=question.text, images=question.images)
            for question in read_questions(data, "exact", led)
        ]
        logits = folder / "logits"
        shutil.rmtree(logits, ignore_errors=True)
        logits.mkdir()
        model = VisionLanguageModel.load(self._base)
        self._answers = ask_reference(model, requests, logits, SilentProgress())

    def score_float(self, checkpoint: str) -> Score:
        """The float bundle itself."""
        found = self._ask(self._base)
        right = _right(found)
        return Score(checkpoint, FLOAT, FLOAT, False, "", len(right), found.overall.score, right, 1)

    def score(self, checkpoint: str, contender: Contender, bundle: Path) -> Score:
        """A contender's bundle."""
        found = self._ask(bundle)
        model = VisionLanguageModel.load(bundle)
        agreement = measure_agreement(self._answers, model, SilentProgress())
        right = _right(found)
        return Score(
            checkpoint=checkpoint,
            group=contender.group,
            contender=contender.name,
            is_ours=contender.is_ours,
            questions=len(right),
            exact=found.overall.score,
            right=right,
            decoder_share=decoder_bytes(bundle) / decoder_bytes(self._base),
            kl_mean=agreement.kl_mean,
            top1=agreement.top1_agreement,
            steps=agreement.steps,
        )

    def failed(self, checkpoint: str, contender: Contender, error: Exception) -> Score:
        """A peer that could not quantize the graphs."""
        message = " ".join(str(error).split())[:_LONGEST_MESSAGE]
        return Score(checkpoint, contender.group, contender.name, failure=message)

    def _ask(self, bundle: Path) -> BundleScores:
        return evaluate(EvaluateOptions(bundle, self._data), SilentProgress()).bundle


def _right(found: BundleScores) -> list[bool]:
    return [answer.score == 1 for answer in found.answers]
