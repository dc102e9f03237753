from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vlmport.api.bisect_deviation import deviation
from vlmport.api.bisect_values import InnerValue, in_groups
from vlmport.api.tolerances import inner_tolerance, tolerance_for

FLOAT32, FLOAT16 = inner_tolerance("float32"), inner_tolerance("float16")
REFERENCE = np.linspace(-2, 2, 101).astype(np.float32)


@pytest.mark.parametrize(("error", "is_fault"), [(1.5e-5, False), (1.7e-5, True)])
def test_float32_is_held_against_its_magnitude(error: float, is_fault: bool) -> None:
    found = REFERENCE.astype(np.float64)
    found[50] += error
    judged = deviation(found, REFERENCE, None, FLOAT32)
    assert judged.is_fault == is_fault
    assert judged.ratio == pytest.approx(error / 1.6e-5, rel=1e-3)
    assert bool(judged.words) == is_fault


def test_a_mean_below_the_largest_is_judged_too() -> None:
    found = REFERENCE.astype(np.float64) + 6e-6
    judged = deviation(found, REFERENCE, None, FLOAT32)
    assert judged.is_fault
    assert "mean_abs 6e-06 (tolerance 3.03e-06)" in judged.words


def test_half_precision_is_held_against_its_own_rounding() -> None:
    reference = REFERENCE.astype(np.float16)
    exact = reference.astype(np.float32) + 0.01
    near = reference.astype(np.float32) - 0.019
    far = reference.astype(np.float32) - 0.021
    assert not deviation(near, reference, exact, FLOAT16).is_fault  # the mean: twice 0.01
    assert deviation(far, reference, exact, FLOAT16).is_fault


def test_a_value_that_is_exact_by_chance_may_be_rounded_once() -> None:
    reference = np.array([1.0, 2.0], np.float16)
    exact = reference.astype(np.float32)
    once = np.array([1.0 + 2.0**-10, 2.0], np.float16)
    assert not deviation(once, reference, exact, FLOAT16).is_fault
    assert deviation(np.array([1.01, 2.0], np.float16), reference, exact, FLOAT16).is_fault


def test_a_lookup_must_be_equal() -> None:
    row = tolerance_for("embed_tokens", "float32")
    assert deviation(REFERENCE, REFERENCE, None, row).ratio == 0.0
    assert deviation(REFERENCE + np.float32(1e-6), REFERENCE, None, row).ratio == math.inf


@pytest.mark.parametrize(
    ("found", "reference", "words"),
    [
        ([1, 2], [1, 3], "1 of 2 integers differ"),
        ([True, False], [True, True], "1 of 2 integers differ"),
        ([1.0, np.nan], [1.0, 2.0], "1 of 2 values are NaN or Inf on one side alone"),
        ([1.0, 2.0], [1.0, np.inf], "1 of 2 values are NaN or Inf on one side alone"),
        ([1.0, -np.inf], [1.0, np.inf], "1 of 2 values are NaN or Inf on one side alone"),
        ([1.0], [1.0, 2.0], "shape [1]; the reference has [2]"),
    ],
)
def test_what_no_tolerance_allows(found: list[Any], reference: list[Any], words: str) -> None:
    judged = deviation(np.array(found), np.array(reference), None, FLOAT32)
    assert judged.ratio == math.inf
    assert judged.words == words


def test_infinity_in_the_same_place_is_a_mask() -> None:
    masked = np.array([1.0, -np.inf, np.nan])
    assert deviation(masked, masked, None, FLOAT32).ratio == 0.0
    empty = np.array([-np.inf])
    assert deviation(empty, empty, None, FLOAT32).ratio == 0.0


def test_groups_hold_as_much_as_fits() -> None:
    shapes: list[tuple[int | str, ...] | None] = [("batch", 10), (5,), ("unknown", 3), None, (1,)]
    values = [InnerValue(str(i), "", "", "", (), shape, False) for i, shape in enumerate(shapes)]
    groups = list(in_groups(values, {"batch": 2}, 25))
    assert [[value.name for value in group] for group in groups] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]
