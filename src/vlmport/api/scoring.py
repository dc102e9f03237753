"""Scores of answers against references, from 0 to 1, each by its published definition."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmport.api.vqa_text import vqa_normalized

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LEAST_VQA_ANSWERS",
    "Metric",
    "Normalization",
    "YesNoScores",
    "anls",
    "exact_match",
    "pope_reads_yes",
    "score",
    "vqa_accuracy",
    "yes_no_scores",
]

Metric = Literal["exact", "vqa", "pope", "anls"]
Normalization = Literal["none", "fold"]

LEAST_VQA_ANSWERS = 4  # with fewer, leaving one out leaves fewer than the three a full score needs
_ANLS_THRESHOLD = 0.5
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(
    metric: Metric, answer: str, references: Sequence[str], normalization: Normalization = "none"
) -> float:
    """One answer's score by one of the metrics.

    Args:
        metric: its name.
        answer: the model's.
        references: right answers; for "pope" one, "yes" or "no".
        normalization: what "exact" overlooks; the others have a normalization of their own.
    """
    if metric == "exact":
        return exact_match(answer, references, normalization)
    if metric == "vqa":
        return vqa_accuracy(answer, references)
    if metric == "anls":
        return anls(answer, references)
    return float(pope_reads_yes(answer) == pope_reads_yes(references[0]))


def exact_match(answer: str, references: Sequence[str], normalization: Normalization) -> float:
    """1 if the answer is one of the references, else 0.

    Args:
        answer: the model's; white space around it never counts.
        references: right answers.
        normalization: "none" compares as is; "fold" in Unicode's folded case, without ASCII
            punctuation, each run of white space as one space.
    """
    return float(
        _compared(answer, normalization) in [_compared(r, normalization) for r in references]
    )


def _compared(text: str, normalization: Normalization) -> str:
    if normalization == "none":
        return text.strip()
    return " ".join(text.casefold().translate(_NO_PUNCTUATION).split())


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """How many people gave the answer: min(count / 3, 1), averaged over all but one of them.

    Args:
        answer: the model's.
        references: what people answered, ten in the published data sets; `LEAST_VQA_ANSWERS` or
            more.

    Source: Antol et al. 2015, "VQA: Visual Question Answering", section 3; Goyal et al. 2017,
    "Making the V in VQA Matter"; visualqa.org/evaluation.html.
    """
    given = vqa_normalized(answer)
    matches = [vqa_normalized(reference) == given for reference in references]
    total = sum(matches)
    return sum(min((total - is_left_out) / 3, 1.0) for is_left_out in matches) / len(matches)


def anls(answer: str, references: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the nearest reference; 0 where half differs.

    1 - d with d = edits / length of the longer text, 0 for d >= 0.5; case and runs of white space
    do not count. The mean over questions is the ANLS.

    Source: Biten et al. 2019, "Scene Text Visual Question Answering", section 3.3, equation 1.
    """
    return max(_similarity(_spaced(answer), _spaced(reference)) for reference in references)


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longer = max(len(one), len(other))
    distance = _edits(one, other) / longer if longer else 0.0
    return 1.0 - distance if distance < _ANLS_THRESHOLD else 0.0


def _edits(one: str, other: str) -> int:
    """Least number of characters inserted, deleted or replaced (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for line, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], line
        for place, against in enumerate(other, start=1):
            edits = min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != against))
            diagonal, row[place] = row[place], edits
    return row[-1]


def pope_reads_yes(answer: str) -> bool:
    """Whether POPE takes an answer for a yes: its first sentence has no word "no" or "not".

    Also an answer that says neither is a yes; upper and lower case are the same.

    Source: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models";
    evaluate.py of its repository, which knows "No", "no" and "not" alone.
    """
    sentence = answer.strip().partition(".")[0].replace(",", "")
    return not {"no", "not"} & set(sentence.lower().split())


@dataclass(frozen=True, slots=True)
class YesNoScores:
    """POPE's figures, "yes" being positive; 0 where a denominator is 0.

    Attributes:
        accuracy: share of right answers.
        precision: of the answers "yes", the share that is right.
        recall: of the questions whose answer is yes, the share that was answered so.
        f1: harmonic mean of precision and recall.
        yes_ratio: share of answers "yes".
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_no_scores(answers: Sequence[str], labels: Sequence[str]) -> YesNoScores:
    """POPE's figures over all questions.

    Args:
        answers: the model's, one or more.
        labels: "yes" or "no" for each.

    Source: Li et al. 2023, section 5.1.
    """
    pairs = [
        (pope_reads_yes(answer), pope_reads_yes(label))
        for answer, label in zip(answers, labels, strict=True)
    ]
    hits = sum(said and wanted for said, wanted in pairs)
    said_yes = sum(said for said, _ in pairs)
    wanted_yes = sum(wanted for _, wanted in pairs)
    return YesNoScores(
        accuracy=sum(said == wanted for said, wanted in pairs) / len(pairs),
        precision=hits / said_yes if said_yes else 0.0,
        recall=hits / wanted_yes if wanted_yes else 0.0,
        # 2PR/(P+R) with P = hits/said and R = hits/wanted
        f1=2 * hits / (said_yes + wanted_yes) if said_yes + wanted_yes else 0.0,
        yes_ratio=said_yes / len(pairs),
    )
