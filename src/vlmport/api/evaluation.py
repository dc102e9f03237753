"""What an evaluation found, as frozen values and as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmport.api.scoring import Metric, Normalization, YesNoScores

__all__ = [
    "EVALUATION_SCHEMA_VERSION",
    "NO_KIND",
    "OVERALL",
    "AnswerComparison",
    "BundleScores",
    "Evaluation",
    "KindComparison",
    "KindScore",
    "ScoredAnswer",
    "evaluation_json",
    "is_right",
]

EVALUATION_SCHEMA_VERSION = 1
OVERALL = "all"
NO_KIND = "(no kind)"
_RIGHT = 0.5


@dataclass(frozen=True, slots=True)
class KindScore:
    """Score of the questions of one kind.

    Attributes:
        kind: as in the data; OVERALL for all questions together.
        count: questions.
        score: mean of their scores, 0 to 1.
        low: lower end of the 95 % Wilson interval.
        high: upper end.
    """

    kind: str
    count: int
    score: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One question, what was answered and its score.

    Attributes:
        id: of the question.
        kind: of the question.
        images: paths of its pictures.
        question: its text.
        references: right answers.
        answer: the model's.
        token_ids: generated, the end-of-sequence token included.
        finish_reason: "stop" or "length".
        score: 0 to 1.
    """

    id: str
    kind: str
    images: tuple[str, ...]
    question: str
    references: tuple[str, ...]
    answer: str
    token_ids: tuple[int, ...]
    finish_reason: str
    score: float


@dataclass(frozen=True, slots=True)
class BundleScores:
    """One bundle's scores.

    Attributes:
        bundle: its folder.
        family: of its manifest.
        variant: of its manifest.
        precision: that its graphs hand to each other, and what was quantized behind it.
        backend: what computed it.
        overall: all questions.
        kinds: each kind, in the order of the data; empty if there is only one.
        yes_no: POPE's figures, if that is the metric.
        answers: all, in the order of the data.
        resumed: answers that were taken from the state of an earlier run.
        seconds: that answering the others took.
    """

    bundle: str
    family: str
    variant: str
    precision: str
    backend: str
    overall: KindScore
    kinds: tuple[KindScore, ...]
    yes_no: YesNoScores | None
    answers: tuple[ScoredAnswer, ...]
    resumed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class KindComparison:
    """Questions of one kind, answered by the bundle and by the one that it is held against.

    Attributes:
        kind: as in the data; OVERALL for all.
        points: the bundle's score less the other's, in points of 100.
        lost: questions that only the other answers right.
        gained: questions that only the bundle answers right.
        p: exact two-sided p of McNemar's test.
    """

    kind: str
    points: float
    lost: int
    gained: int
    p: float


@dataclass(frozen=True, slots=True)
class AnswerComparison:
    """Two bundles' answers to the same questions.

    Attributes:
        overall: all questions.
        kinds: each kind; empty if there is only one.
        lost: places, from 0, of the questions that only the other bundle answers right.
        gained: places of the questions that only the bundle answers right.
        same_answers: answers with the same tokens.
        common_tokens: tokens before the answers part, over all questions.
        tokens: of the longer answer, over all questions.
    """

    overall: KindComparison
    kinds: tuple[KindComparison, ...]
    lost: tuple[int, ...]
    gained: tuple[int, ...]
    same_answers: int
    common_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A bundle's answers to a set of questions, alone or beside another bundle's.

    Attributes:
        schema_version: of the JSON form.
        data: the file of questions.
        data_digest: SHA-256 of the questions' texts and the bytes of their pictures.
        metric: how an answer is scored.
        normalization: what "exact" overlooks.
        max_new_tokens: most tokens of an answer; None for the bundle's default.
        batch: questions answered together.
        bundle: the bundle's scores.
        against: the other bundle's, if there is one.
        comparison: of the two.
        versions: of the libraries.
    """

    schema_version: int
    data: str
    data_digest: str
    metric: Metric
    normalization: Normalization
    max_new_tokens: int | None
    batch: int
    bundle: BundleScores
    against: BundleScores | None
    comparison: AnswerComparison | None
    versions: dict[str, str]


def is_right(score: float) -> bool:
    """Whether a score counts as right where only right and wrong are told apart: 0.5 or more."""
    return score >= _RIGHT


def evaluation_json(evaluation: Evaluation) -> str:
    """All of it as one JSON object."""
    return json.dumps(dataclasses.asdict(evaluation), indent=2, ensure_ascii=False) + "\n"
