"""Draws the table of contenders."""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

from peers.peer_scores import FLOAT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peers.peer_scores import Score

__all__ = ["sign_test", "table"]

_HEAD = (
    "| quantizer | decoder weights | exact | vlmport's lead, points | right only here, only vlmport"
    " | p | KL, millinats | same likeliest token |"
)


def table(found: Mapping[str, Sequence[Score]]) -> str:
    """Markdown, one table for each checkpoint and group.

    Args:
        found: environment -> scores measured in it.
    """
    lines: list[str] = []
    for environment, scores in found.items():
        lines += [environment, ""]
        for checkpoint in dict.fromkeys(score.checkpoint for score in scores):
            lines += _checkpoint([score for score in scores if score.checkpoint == checkpoint])
    return "\n".join(lines).rstrip()


def sign_test(first: int, second: int) -> float:
    """Probability of a split at least as uneven if both sides were equally likely.

    Two-sided, exact; the sign test of paired answers (McNemar 1947).

    Args:
        first: questions that only one side answers right.
        second: questions that only the other one does.
    """
    total, fewer = first + second, min(first, second)
    tail = sum(comb(total, count) for count in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**total))


def _checkpoint(scores: Sequence[Score]) -> list[str]:
    base = next(score for score in scores if score.group == FLOAT)
    lines = []
    for group in dict.fromkeys(score.group for score in scores if score.group != FLOAT):
        members = [score for score in scores if score.group == group]
        ours = next(score for score in members if score.is_ours)
        lines += [
            f"### {base.checkpoint}, {group}",
            "",
            _introduction(base, ours),
            "",
            _HEAD,
            "|" + "---|" * (_HEAD.count("|") - 1),
            *(_row(member, ours) for member in members),
            "",
        ]
    return lines


def _introduction(base: Score, ours: Score) -> str:
    return (
        f"float32 answers {base.exact:.2%} of {base.questions} questions; {ours.steps} next tokens "
        "are compared with its own."
    )


def _row(score: Score, ours: Score) -> str:
    if score.failure:
        words = score.failure.replace("|", "/")
        return f"| {score.contender} | failed: {words} | | | | | | |"
    assert score.exact is not None
    assert ours.exact is not None
    assert score.right is not None
    assert ours.right is not None
    pairs = list(zip(score.right, ours.right, strict=True))
    here, there = pairs.count((True, False)), pairs.count((False, True))
    lead = f"{100 * (ours.exact - score.exact):+.2f}"
    against = ("", "", "") if score.is_ours else (lead, f"{here}, {there}", _p(here, there))
    kl = "not finite" if score.kl_mean is None else f"{1000 * score.kl_mean:.3g}"
    cells = (
        score.contender,
        f"{score.decoder_share:.1%}",
        f"{score.exact:.2%}",
        *against,
        kl,
        f"{score.top1:.2%}",
    )
    return f"| {' | '.join(cells)} |"


def _p(here: int, there: int) -> str:
    return f"{sign_test(here, there):.2g}"
