from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.calibration.gptq import compensated, damped, error_feedback, output_error
from vlmport.calibration.rounding import INT4, dequantize, round_to_nearest


def second_moment(seed: int, channels: int, positions: int) -> np.ndarray:
    """Of inputs whose channels go together and differ in size, as a model's do."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(positions, channels // 4)) @ generator.normal(
        size=(channels // 4, channels)
    )
    inputs = mixed + 0.3 * generator.normal(size=mixed.shape)
    inputs *= np.exp(generator.normal(size=channels))
    return (inputs.T @ inputs).astype(np.float32)


def weights(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def exactly_damped(moment: np.ndarray, damping: float) -> np.ndarray:
    exact = moment.astype(np.float64)
    return np.asarray(exact + np.eye(len(exact)) * np.diagonal(exact).mean() * damping)


def test_damping_adds_a_share_of_the_mean_to_the_diagonal() -> None:
    moment = second_moment(1, 32, 20)
    np.testing.assert_allclose(damped(moment, 0.03), exactly_damped(moment, 0.03), rtol=1e-6)


def test_feedback_factors_the_damped_second_moment() -> None:
    moment = second_moment(0, 32, 100)
    matrix, remaining = error_feedback(damped(moment, 0.05))
    np.testing.assert_array_equal(np.tril(matrix, -1), 0)
    np.testing.assert_allclose(np.diagonal(matrix), 1, rtol=1e-6)
    product = (matrix.astype(np.float64) * remaining) @ matrix.T.astype(np.float64)
    expected = exactly_damped(moment, 0.05)
    np.testing.assert_allclose(product, expected, atol=1e-5 * np.abs(expected).max())


def optimal_brain_quantization(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, block_size: int
) -> np.ndarray:
    """Frantar et al. 2022, equation 2, in order: the inverse is reduced row by row."""
    weight, inverse = weight.astype(np.float64).copy(), np.linalg.inv(hessian)
    values = np.empty(weight.shape)
    for row in range(len(weight)):
        step = scale[row // block_size].astype(np.float64)
        values[row] = np.clip(np.rint(weight[row] / step), -8, 7)
        error = (weight[row] - values[row] * step) / inverse[row, row]
        weight[row:] -= np.outer(inverse[row:, row], error)
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    return values


@pytest.mark.parametrize("seed", range(4))
def test_integers_equal_the_published_update(seed: int) -> None:
    moment, weight = second_moment(seed, 64, 300), weights(seed, 64, 16)
    rounded = compensated(weight, error_feedback(damped(moment, 0.02)), 16, INT4, np.float32)
    expected = optimal_brain_quantization(weight, exactly_damped(moment, 0.02), rounded.scale, 16)
    # A value between two integers may fall to either side in float32, and so all that follow it
    # in its column.
    same = (rounded.values == expected).all(axis=0)
    assert same.mean() >= 0.8, same


def test_two_rows_are_rounded_as_well_as_can_be_after_the_first() -> None:
    """Brute force: given the first row's integer, no other integer of the second is better."""
    moment, weight = second_moment(7, 8, 50)[:2, :2], weights(7, 2, 40)
    rounded = compensated(weight, error_feedback(moment), 2, INT4, np.float32)
    step = rounded.scale[0].astype(np.float64)
    for column in range(40):
        kept = rounded.values[0, column] * step[column]
        errors = []
        for integer in range(-8, 8):
            error = weight[:, column] - np.array([kept, integer * step[column]])
            errors.append(error @ moment.astype(np.float64) @ error)
        ours = errors[int(rounded.values[1, column]) + 8]
        assert ours <= min(errors) * (1 + 1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), positions=st.integers(8, 400))
def test_the_output_is_nearer_than_with_rounding_to_nearest(seed: int, positions: int) -> None:
    moment, weight = second_moment(seed, 64, positions), weights(seed + 1, 64, 48)
    nearest = round_to_nearest(weight, 32, INT4, np.float32)
    ours = compensated(weight, error_feedback(damped(moment)), 32, INT4, np.float32)
    before = output_error(weight, dequantize(nearest), moment).sum()
    after = output_error(weight, dequantize(ours), moment).sum()
    assert after < before


def test_without_correlation_rounding_is_to_nearest() -> None:
    weight = weights(3, 64, 32)
    importance = np.random.default_rng(3).gamma(1, size=64).astype(np.float32)
    ours = compensated(weight, error_feedback(np.diag(importance)), 32, INT4, np.float32)
    nearest = round_to_nearest(weight, 32, INT4, np.float32, importance)
    np.testing.assert_array_equal(ours.values, nearest.values)
    np.testing.assert_array_equal(ours.scale, nearest.scale)


def test_a_channel_that_was_always_zero_does_no_harm() -> None:
    moment, weight = second_moment(5, 64, 200), weights(5, 64, 8)
    moment[10], moment[:, 10] = 0, 0
    rounded = compensated(weight, error_feedback(damped(moment)), 32, INT4, np.float32)
    assert np.isfinite(rounded.scale).all()
    assert np.abs(dequantize(rounded) - weight).max() < 2 * np.abs(weight).max()


def test_output_error_is_that_of_the_outputs() -> None:
    generator = np.random.default_rng(8)
    inputs = generator.normal(size=(50, 12))
    weight, rounded = generator.normal(size=(2, 12, 5))
    expected = np.square(inputs @ (weight - rounded)).sum(axis=0)
    moment = (inputs.T @ inputs).astype(np.float32)
    error = output_error(weight.astype(np.float32), rounded.astype(np.float32), moment)
    np.testing.assert_allclose(error, expected, rtol=1e-4)
