"""Scores by kind of question, and two bundles' answers side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.api.evaluation import (
    NO_KIND,
    OVERALL,
    AnswerComparison,
    KindComparison,
    KindScore,
    is_right,
)
from vlmport.api.score_statistics import mcnemar_p, wilson_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.evaluation import BundleScores, Evaluation, ScoredAnswer

__all__ = ["common_tokens", "compare_answers", "score_kinds", "score_rows"]


def score_kinds(answers: Sequence[ScoredAnswer]) -> tuple[KindScore, tuple[KindScore, ...]]:
    """Scores of all answers together, and of each kind if there are several."""
    overall = _kind_score(OVERALL, [answer.score for answer in answers])
    kinds = (
        _kind_score(kind, [answers[place].score for place in places])
        for kind, places in _places_by_kind(answers).items()
    )
    return overall, tuple(kinds)


def compare_answers(bundle: BundleScores, against: BundleScores) -> AnswerComparison:
    """Compares answers to the same questions, in the same order."""
    ours, theirs = bundle.answers, against.answers
    pairs = list(zip(ours, theirs, strict=True))
    kinds = (
        _kind_comparison(kind, [pairs[place] for place in places])
        for kind, places in _places_by_kind(ours).items()
    )
    return AnswerComparison(
        overall=_kind_comparison(OVERALL, pairs),
        kinds=tuple(kinds),
        lost=tuple(place for place, pair in enumerate(pairs) if _is_lost(*pair)),
        gained=tuple(place for place, (a, b) in enumerate(pairs) if _is_lost(b, a)),
        same_answers=sum(a.token_ids == b.token_ids for a, b in pairs),
        common_tokens=sum(common_tokens(a.token_ids, b.token_ids) for a, b in pairs),
        tokens=sum(max(len(a.token_ids), len(b.token_ids)) for a, b in pairs),
    )


def score_rows(
    evaluation: Evaluation,
) -> list[tuple[KindScore, KindScore | None, KindComparison | None]]:
    """One row a kind, all questions last: the bundle's score, the other's, their comparison."""
    against, comparison = evaluation.against, evaluation.comparison
    ours = [*evaluation.bundle.kinds, evaluation.bundle.overall]
    if against is None or comparison is None:
        return [(score, None, None) for score in ours]
    theirs = [*against.kinds, against.overall]
    return list(zip(ours, theirs, [*comparison.kinds, comparison.overall], strict=True))


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common before they part."""
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


def _places_by_kind(answers: Sequence[ScoredAnswer]) -> dict[str, list[int]]:
    """Each kind's places in the order of the data; none if all answers are of one kind."""
    kinds: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        kinds.setdefault(answer.kind or NO_KIND, []).append(place)
    return kinds if len(kinds) > 1 else {}


def _kind_score(kind: str, scores: Sequence[float]) -> KindScore:
    mean = sum(scores) / len(scores)
    low, high = wilson_interval(mean, len(scores))
    return KindScore(kind, len(scores), mean, low, high)


def _kind_comparison(
    kind: str, pairs: Sequence[tuple[ScoredAnswer, ScoredAnswer]]
) -> KindComparison:
    lost = sum(_is_lost(ours, theirs) for ours, theirs in pairs)
    gained = sum(_is_lost(theirs, ours) for ours, theirs in pairs)
    points = 100 * sum(ours.score - theirs.score for ours, theirs in pairs) / len(pairs)
    return KindComparison(kind, points, lost, gained, mcnemar_p(lost, gained))


def _is_lost(ours: ScoredAnswer, theirs: ScoredAnswer) -> bool:
    return is_right(theirs.score) and not is_right(ours.score)
