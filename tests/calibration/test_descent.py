from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.calibration.descent import descended
from vlmport.calibration.gptq import compensated, error_feedback, output_error
from vlmport.calibration.rounding import INT4, QuantizedWeight, dequantize, round_to_nearest


def case(seed: int, rows: int = 64, columns: int = 24) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(300, rows // 4)) @ generator.normal(size=(rows // 4, rows))
    inputs += 0.3 * generator.normal(size=inputs.shape)
    moment = (inputs.T @ inputs).astype(np.float32)
    return generator.normal(size=(rows, columns)).astype(np.float32), moment


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), is_half=st.booleans(), compensates=st.booleans())
def test_the_error_never_grows(seed: int, is_half: bool, compensates: bool) -> None:
    weight, moment = case(seed)
    dtype = np.float16 if is_half else np.float32
    start = (
        compensated(weight, error_feedback(moment), 32, INT4, dtype)
        if compensates
        else round_to_nearest(weight, 32, INT4, dtype)
    )
    kept = start.values.copy(), start.scale.copy()
    ours = descended(weight, start, moment, INT4)
    before = output_error(weight, dequantize(start), moment)
    after = output_error(weight, dequantize(ours), moment)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.97 * before.sum()
    assert ours.values.min() >= -8
    assert ours.values.max() <= 7
    assert (ours.scale > 0).all()
    assert ours.scale.dtype == dtype
    np.testing.assert_array_equal(start.values, kept[0])
    np.testing.assert_array_equal(start.scale, kept[1])


@pytest.mark.parametrize("seed", range(3))
def test_no_single_integer_can_be_improved_at_the_end(seed: int) -> None:
    weight, moment = case(seed, rows=16, columns=6)
    start = round_to_nearest(weight, 16, INT4, np.float32)
    ours = descended(weight, start, moment, INT4, sweeps=40)
    exact, step = moment.astype(np.float64), ours.scale[0].astype(np.float64)

    def errors(values: np.ndarray) -> np.ndarray:
        error = weight - values * step
        return np.asarray(np.einsum("io,io->o", error, exact @ error))

    least = errors(ours.values.astype(np.float64))
    for row, change in itertools.product(range(16), (-1, 1)):
        other = ours.values.astype(np.float64)
        other[row] = np.clip(other[row] + change, -8, 7)
        assert (errors(other) >= least * (1 - 1e-4)).all()


def test_the_scale_is_that_of_least_squares() -> None:
    weight, moment = case(5, rows=32, columns=8)
    start = round_to_nearest(weight, 32, INT4, np.float32)
    ours = descended(weight, start, moment, INT4, sweeps=30)
    exact, integers = moment.astype(np.float64), ours.values.astype(np.float64)
    best = np.einsum("io,io->o", integers, exact @ weight) / np.einsum(
        "io,io->o", integers, exact @ integers
    )
    np.testing.assert_allclose(ours.scale[0], best, rtol=1e-3)


def test_a_weight_on_the_grid_stays() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (32, 4)).astype(np.int8)
    start = QuantizedWeight(values, np.full((1, 4), 0.5, np.float32))
    ours = descended(dequantize(start), start, case(1, rows=32)[1], INT4)
    np.testing.assert_array_equal(ours.values, values)
    np.testing.assert_array_equal(ours.scale, start.scale)
