"""What a share of right answers says about all questions: intervals and a paired test."""

from __future__ import annotations

import math

__all__ = ["mcnemar_p", "wilson_interval"]

_Z = 1.959963984540054  # the normal distribution's quantile of 0.975


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    Args:
        mean: share of right answers, 0 to 1. For scores between 0 and 1 the interval is on the safe
            side: no such scores vary more than rights and wrongs of the same mean.
        count: answers, 1 or more.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    square = _Z * _Z / count
    centre = (mean + square / 2) / (1 + square)
    spread = _Z / (1 + square) * math.sqrt(mean * (1 - mean) / count + square / (4 * count))
    # At the ends of the scale centre and spread are equal; rounding must not leave a difference.
    low = 0.0 if mean == 0 else max(0.0, centre - spread)
    return low, 1.0 if mean == 1 else min(1.0, centre + spread)


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided p of the same questions answered by two models, by those that flipped.

    If neither were better, each flip would go either way like a coin.

    Args:
        lost: questions that only the first answers right.
        gained: questions that only the second answers right.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions"; the exact form is the sign test of the flips.
    """
    flips = lost + gained
    tail = sum(math.comb(flips, few) for few in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << flips))
