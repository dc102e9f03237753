from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlmport.api.signal_noise import Signal, SignalSums


def values(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def of(found: NDArray[Any], reference: NDArray[Any], axis: int = -1) -> Signal:
    sums = SignalSums(axis)
    sums.add(found, reference)
    return sums.signal()


def test_ratio_and_cosine_equal_their_definitions() -> None:
    x, noise = values(1, (7, 5)), values(2, (7, 5)) / np.float32(10)
    signal = of(x + noise, x)
    wide, error = x.astype(np.float64), (x + noise).astype(np.float64) - x
    expected = 10 * np.log10(np.square(wide).sum() / np.square(error).sum())
    assert signal.snr_db == pytest.approx(float(expected), rel=1e-9)
    y = wide + error
    cosine = (wide * y).sum() / np.sqrt(np.square(wide).sum() * np.square(y).sum())
    assert signal.cosine == pytest.approx(float(cosine), rel=1e-12)
    assert signal.max_abs == pytest.approx(float(np.abs(error).max()), rel=1e-12)
    assert signal.elements == 35


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 9))
def test_pieces_sum_to_the_whole(pieces: list[int], seed: int) -> None:
    x, y = values(seed, (sum(pieces), 3)), values(seed + 1, (sum(pieces), 3))
    sums, start = SignalSums(-1), 0
    for length in pieces:
        sums.add(y[start : start + length], x[start : start + length])
        start += length
    assert sums.signal().snr_db == pytest.approx(of(y, x).snr_db, rel=1e-9)
    assert sums.signal().cosine == pytest.approx(of(y, x).cosine, rel=1e-9)


def test_equal_values_are_exact() -> None:
    signal = of(values(1, (4, 4)), values(1, (4, 4)))
    assert signal.is_exact
    assert (signal.snr_db, signal.gain_free_snr_db, signal.cosine) == (None, None, 1.0)


def test_gains_of_the_channels_are_found_and_taken_out() -> None:
    x = values(1, (64, 4))
    gains = np.array([0.5, 1.0, 2.0, 8.0], np.float32)
    noise = values(2, (64, 4)) / np.float32(1000)
    signal = of((x + noise) * gains, x)
    assert signal.snr_db is not None
    assert signal.gain_free_snr_db is not None
    assert signal.snr_db < 0
    assert signal.gain_free_snr_db == pytest.approx(60, abs=1.5)
    assert signal.gain_spread is not None
    assert signal.gain_spread > 4


def test_a_doubled_layer_has_one_gain() -> None:
    x = values(1, (64, 8))
    signal = of(2 * x + values(2, (64, 8)) / np.float32(4), x)
    assert signal.gain == pytest.approx(2, abs=0.05)
    assert signal.gain_spread == pytest.approx(1, abs=0.1)


def test_channels_of_a_convolution_lie_on_axis_one() -> None:
    x = values(1, (2, 3, 4, 5))
    gains = np.array([1, 2, 4], np.float32)[:, None, None]
    exact = of(x * gains, x, axis=1)
    assert exact.gain_free_snr_db is None or exact.gain_free_snr_db > 120
    spread = of(x * gains, x, axis=-1).gain_free_snr_db
    assert spread is not None
    assert spread < 40


def test_nan_is_counted_and_leaves_no_figure() -> None:
    y = values(1, (3, 3))
    y[0, 0], y[1, 1] = np.nan, np.inf
    signal = of(y, values(1, (3, 3)))
    assert signal.nonfinite == 2
    assert (signal.snr_db, signal.cosine, signal.max_abs, signal.gain) == (None, None, None, None)


def test_noise_without_signal_is_told() -> None:
    signal = of(values(1, (3, 3)), np.zeros((3, 3), np.float32))
    assert signal.snr_db == -3000.0
    assert signal.cosine == 0.0
    assert signal.gain is None


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3\]; the reference has \[3, 2\]"):
        of(values(1, (2, 3)), values(1, (3, 2)))
