"""Padding of pictures of many sizes, and names of values."""

from __future__ import annotations

import numpy as np
import pytest

from vlmport.calibration.probed_graph import ProbedValue
from vlmport.calibration.statistics import Probe


def value(shape: tuple[int | str | None, ...] | None, axis: int = -1) -> ProbedValue:
    return ProbedValue(Probe("x", axis), "x", False, shape, None)  # type: ignore[arg-type]


MASK = np.array([[True, True, False, True, True, False], [True] * 6])


def test_positions_of_patches_are_masked_on_whichever_axis() -> None:
    tokens = value(("num_tiles", "num_patches", 8)).valid_positions((2, 6, 8), MASK)
    np.testing.assert_array_equal(tokens, MASK)
    heads = value(("num_tiles", 6, "num_patches", 8)).valid_positions((2, 6, 6, 8), MASK)
    assert heads is not None
    np.testing.assert_array_equal(heads, np.repeat(MASK[:, None], 6, axis=1))
    unknown = value(None).valid_positions((2, 6, 8), MASK)
    np.testing.assert_array_equal(unknown, MASK)


def test_what_is_appended_to_patches_counts() -> None:
    found = value(("num_tiles", "s58 + 9", 8)).valid_positions((2, 15, 8), MASK)
    expected = np.concatenate([MASK, np.ones((2, 9), np.bool_)], axis=1)
    np.testing.assert_array_equal(found, expected)


def test_an_axis_of_fixed_length_has_no_padding() -> None:
    """Six latents beside six patches."""
    assert value(("num_tiles", 6, 8)).valid_positions((2, 6, 8), MASK) is None


def test_pixels_of_padded_patches_are_masked() -> None:
    found = value(("num_tiles", 3, "height", "width"), 1).valid_positions((2, 3, 8, 12), MASK)
    assert found is not None
    assert found.shape == (2, 8, 12)
    np.testing.assert_array_equal(found[0, 0, ::4], MASK[0, :3])
    np.testing.assert_array_equal(found[0].sum(axis=1), np.full(8, 8))
    assert found[1].all()


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 8), (1, 6, 8)])
def test_values_without_patches_count_wholly(shape: tuple[int, ...]) -> None:
    assert value(None).valid_positions(shape, MASK) is None


def test_nothing_is_masked_where_nothing_is_padded() -> None:
    assert value(None).valid_positions((2, 6, 8), np.ones_like(MASK)) is None
