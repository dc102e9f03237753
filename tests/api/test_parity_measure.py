from __future__ import annotations

import numpy as np
import pytest

from vlmport.api.parity_measure import compare_arrays, fault_of, limits_of
from vlmport.api.tolerances import tolerance_for

FEATURES = tolerance_for("vision_encoder", "float32")
LOGITS = tolerance_for("logits", "float32")


def test_numbers_of_a_small_difference() -> None:
    found = np.array([1.0, 2.0, 4.0], np.float32)
    result = compare_arrays(found, np.array([1.0, 2.0, 3.0], np.float32))
    assert result.max_abs == 1.0
    assert result.mean_abs == pytest.approx(1 / 3)
    assert (result.reference_max_abs, result.reference_mean_abs) == (3.0, 2.0)
    assert result.cosine == pytest.approx(17 / np.sqrt(21 * 14))


def test_shapes_that_differ_are_a_fault_with_both_shapes() -> None:
    result = compare_arrays(np.zeros((1, 3)), np.zeros((1, 4)))
    assert result.max_abs is None
    assert result.cosine is None
    assert fault_of(result, LOGITS, "PyTorch") == "shape [1, 3]; PyTorch has [1, 4]"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_a_fault_of_the_side_that_has_them(bad: float) -> None:
    good, broken = np.ones(3), np.array([1.0, bad, 1.0])
    ours = fault_of(compare_arrays(broken, good), LOGITS, "PyTorch")
    theirs = fault_of(compare_arrays(good, broken), LOGITS, "PyTorch")
    assert ours == "1 values are NaN or Inf; expected finite ones"
    assert theirs == "PyTorch itself has 1 values that are NaN or Inf"
    assert fault_of(compare_arrays(broken, broken), LOGITS, "PyTorch") is not None


def test_equal_infinities_are_no_equality() -> None:
    both = np.array([np.inf])
    assert compare_arrays(both, both).max_abs is None


def test_empty_arrays_are_equal() -> None:
    result = compare_arrays(np.zeros((0, 4)), np.zeros((0, 4)))
    assert (result.max_abs, result.cosine) == (0.0, None)
    assert fault_of(result, LOGITS, "PyTorch") is None


def test_cosine_of_constant_arrays() -> None:
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert compare_arrays(zeros, zeros).cosine == 1.0
    assert compare_arrays(zeros, ones).cosine == 0.0
    assert compare_arrays(3 * ones, ones).cosine == pytest.approx(1.0)
    assert compare_arrays(-ones, ones).cosine == -1.0


def test_a_cosine_never_leaves_its_range() -> None:
    huge = np.full(1000, 3.4e38, np.float32)
    assert compare_arrays(huge, huge).cosine == 1.0


def test_relative_limits_follow_the_reference() -> None:
    reference = np.array([500.0, 1.0], np.float32)
    result = compare_arrays(reference, reference)
    assert limits_of(result, FEATURES) == pytest.approx((500 * 8e-6, 250.5 * 3e-6))
    assert limits_of(result, LOGITS) == (1e-4, None)


def test_an_error_that_outliers_hide_from_the_maximum_shows_in_the_mean() -> None:
    reference = np.ones(1000, np.float32)
    reference[0] = 500.0
    found = reference + np.float32(1e-4)
    fault = fault_of(compare_arrays(found, reference), FEATURES, "PyTorch")
    assert fault is not None
    assert fault == "mean_abs 0.0001; tolerance 4.5e-06 (3e-06 of 1.5)"
    assert "max_abs" not in fault
