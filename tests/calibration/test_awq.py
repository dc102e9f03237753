from __future__ import annotations

import numpy as np
import pytest

from vlmport.calibration.awq import EXPONENTS, channel_scale, scaled_moment, search_scale
from vlmport.calibration.rounding import INT4, dequantize, round_to_nearest

OWN = np.arange(32)


def inputs_with_outliers(seed: int, channels: int = 32) -> np.ndarray:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(300, channels))
    inputs[:, [3, 17]] *= 30
    return inputs.astype(np.float32)


def test_scale_is_the_published_power_of_the_magnitude() -> None:
    magnitude = np.random.default_rng(0).gamma(2, size=32)
    scale = channel_scale(magnitude, OWN, 0.5)
    expected = magnitude**0.5 / np.sqrt((magnitude**0.5).max() * (magnitude**0.5).min())
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    assert scale.max() * scale.min() == pytest.approx(1, rel=1e-6)
    np.testing.assert_array_equal(channel_scale(magnitude, OWN, 0), 1)


def test_channels_of_a_group_share_the_scale_of_their_mean_square() -> None:
    magnitude = np.array([1.0, 2.0, 3.0, 4.0])
    scale = channel_scale(magnitude, np.array([0, 1, 0, 1]), 1.0)
    assert scale[0] == scale[2]
    assert scale[1] == scale[3]
    assert scale[1] / scale[0] == pytest.approx(np.sqrt((4 + 16) / (1 + 9)), rel=1e-6)


def test_a_channel_that_was_always_zero_keeps_a_finite_scale() -> None:
    scale = channel_scale(np.array([0.0, 1.0, 2.0]), np.arange(3), 1.0)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    np.testing.assert_array_equal(channel_scale(np.zeros(3), np.arange(3), 1.0), 1)


def test_the_moment_of_a_scaled_input_follows_from_that_of_the_input() -> None:
    inputs = inputs_with_outliers(1).astype(np.float64)
    scale = channel_scale(np.sqrt((inputs**2).mean(0)), OWN, 0.7).astype(np.float64)
    expected = (inputs / scale).T @ (inputs / scale)
    found = scaled_moment((inputs.T @ inputs).astype(np.float32), scale.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.max())


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_least_output_error_of_its_grid(seed: int) -> None:
    inputs = inputs_with_outliers(seed)
    generator = np.random.default_rng(seed + 10)
    weights = [generator.normal(size=(32, n)).astype(np.float32) for n in (16, 8)]
    moment = inputs.T @ inputs

    found = search_scale(
        weights,
        moment,
        len(inputs),
        OWN,
        lambda place, weight, scaled: round_to_nearest(weight, 32, INT4, np.float32),
    )

    def error(scale: np.ndarray) -> float:
        total = 0.0
        for weight in weights:
            rounded = dequantize(round_to_nearest(weight * scale[:, None], 32, INT4, np.float32))
            difference = inputs.astype(np.float64) @ (rounded / scale[:, None] - weight)
            total += float(np.square(difference).sum())
        return total

    magnitude = np.sqrt(np.square(inputs).mean(axis=0))
    errors = {power: error(channel_scale(magnitude, OWN, power)) for power in EXPONENTS}
    assert errors[found.exponent] <= min(errors.values()) * (1 + 1e-3)
    assert found.exponent > 0
    assert found.gain == pytest.approx(errors[found.exponent] / errors[0], rel=1e-3)
    assert found.gain < 0.7
