from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlmport.api.score_statistics import mcnemar_p, wilson_interval


def test_a_published_wilson_interval() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(1, 2000), st.floats(0, 1))
@example(7, 0.0)
@example(7, 1.0)
def test_wilsons_ends_are_where_the_score_test_turns(count: int, share: float) -> None:
    mean = round(share * count) / count
    for end in wilson_interval(mean, count):
        if 0 < end < 1:
            deviation = math.sqrt(end * (1 - end) / count)
            assert abs(mean - end) == pytest.approx(1.959964 * deviation, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 3), (5, 1), (2, 9), (0, 8)])
def test_mcnemar_counts_all_ways_the_flips_could_go(lost: int, gained: int) -> None:
    flips = lost + gained
    ways = [sum(way) for way in itertools.product((0, 1), repeat=flips)]
    uneven = sum(abs(2 * way - flips) >= abs(lost - gained) for way in ways)
    assert mcnemar_p(lost, gained) == pytest.approx(uneven / len(ways), abs=1e-15)


def test_mcnemar_of_many_flips_does_not_overflow() -> None:
    assert mcnemar_p(3000, 3000) == 1
    assert 0 < mcnemar_p(900, 1100) < 1e-4
