from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.calibration.rounding import (
    INT4,
    INT8,
    IntegerRange,
    QuantizedWeight,
    amax_scale,
    dequantize,
    round_to_nearest,
    round_with,
    searched_scale,
)

RANGES = pytest.mark.parametrize("limits", [INT4, INT8], ids=["int4", "int8"])


def weights(seed: int, rows: int = 64, columns: int = 24) -> np.ndarray:
    generator = np.random.default_rng(seed)
    heavy = generator.standard_t(3, (rows, columns)) * np.exp(generator.normal(size=columns))
    return heavy.astype(np.float32)


@RANGES
def test_amax_scale_is_the_smallest_that_clips_nothing(limits: IntegerRange) -> None:
    block = weights(0)
    scale = amax_scale(block, limits)
    for column, step in zip(block.T.astype(np.float64), scale, strict=True):
        assert column.max() <= step * limits.highest * (1 + 1e-12)
        assert column.min() >= step * limits.lowest * (1 + 1e-12)
        ends = (column.max() / limits.highest, column.min() / limits.lowest)
        assert step == pytest.approx(max(ends), rel=1e-12)


@RANGES
def test_nearest_integers_match_float64(limits: IntegerRange) -> None:
    block = weights(1)
    scale = searched_scale(block, limits, np.float32)
    exact = block.astype(np.float64) / scale.astype(np.float64)
    expected = np.clip(np.rint(exact), limits.lowest, limits.highest)
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-5  # not between two integers
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(round_with(block, scale, limits)[clear], expected[clear])


@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scale_has_the_least_squared_error_of_its_grid(weighted: bool) -> None:
    block = weights(2).astype(np.float64)
    importance = np.random.default_rng(3).gamma(0.3, size=len(block)) if weighted else None
    found = searched_scale(
        block.astype(np.float32),
        INT4,
        np.float32,
        None if importance is None else importance.astype(np.float32),
    )
    shares = np.ones(len(block)) if importance is None else importance
    for column, step in zip(block.T, found, strict=True):
        widest = max(column.max() / 7, -column.min() / 8)
        errors = []
        for share in INT4.shares:
            grid = np.clip(np.rint(column / (share * widest)), -8, 7) * share * widest
            errors.append(shares @ np.square(column - grid))
        grid = np.clip(np.rint(column / step), -8, 7) * step
        assert shares @ np.square(column - grid) <= min(errors) * (1 + 1e-5)


def test_search_beats_clipping_nothing_where_one_weight_is_far_out() -> None:
    block = weights(4, rows=32)
    block[0] = 6 * np.abs(block).max(axis=0)
    block[1] = -block[0]
    importance = np.ones(32, np.float32)
    importance[:2] = 1e-4
    widest = amax_scale(block, INT4).astype(np.float32)
    found = searched_scale(block, INT4, np.float32, importance)
    error = {
        name: importance @ np.square(block - round_with(block, scale, INT4) * scale)
        for name, scale in (("widest", widest), ("found", found))
    }
    assert (error["found"] < error["widest"]).mean() > 0.9


@RANGES
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 3), is_half=st.booleans())
def test_rounded_weights_are_in_range_and_near(
    limits: IntegerRange, seed: int, blocks: int, is_half: bool
) -> None:
    weight = weights(seed, 32 * blocks)
    rounded = round_to_nearest(weight, 32, limits, np.float16 if is_half else np.float32)
    assert rounded.values.min() >= limits.lowest
    assert rounded.values.max() <= limits.highest
    assert rounded.scale.dtype == (np.float16 if is_half else np.float32)
    assert (rounded.scale > 0).all()
    step = np.repeat(rounded.scale.astype(np.float64), 32, axis=0)
    inside = (weight <= step * limits.highest) & (weight >= step * limits.lowest)
    error = np.abs(weight - dequantize(rounded))
    assert (error[inside] <= 0.5001 * step[inside]).all()


def test_a_block_of_zeros_stays_zero() -> None:
    weight = weights(5)
    weight[:32, 3] = 0
    rounded = round_to_nearest(weight, 32, INT4, np.float16)
    assert rounded.scale[0, 3] == 1
    assert not dequantize(rounded)[:32, 3].any()


def test_scales_of_tiny_weights_are_normal_numbers_of_float16() -> None:
    rounded = round_to_nearest(weights(6) * np.float32(1e-7), 32, INT4, np.float16)
    assert (rounded.scale >= np.float16(2**-14)).all()
    assert np.isfinite(dequantize(rounded)).all()


def test_dequantize_repeats_the_scale_over_its_block() -> None:
    values = np.arange(-4, 4, dtype=np.int8).reshape(4, 2)
    scale = np.array([[0.5, 2.0], [1.0, 4.0]], np.float32)
    expected = [[-2, -6], [-1, -2], [0, 4], [2, 12]]
    np.testing.assert_array_equal(dequantize(QuantizedWeight(values, scale)), expected)
