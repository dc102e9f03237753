"""Thresholds against their published definitions, written out plainly in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlmport.calibration.observers import (
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    threshold,
)
from vlmport.calibration.recipe import ActivationMethod
from vlmport.calibration.statistics import Histogram, ValueStatistics
from vlmport.errors import CalibrationError

OBSERVERS = ("min_max", "percentile", "entropy", "mse")


def histogram_of(values: NDArray[np.float64], bins: int = 2048) -> Histogram:
    """Counts of |x| in bins as wide as a power of two, as the accumulation has them."""
    magnitudes = np.abs(values)
    width = 2.0 ** math.frexp(float(magnitudes.max()))[1] / bins
    counts = np.bincount((magnitudes / width).astype(np.int64), minlength=bins)
    return Histogram(counts.astype(np.int64), width)


def statistics_of(values: NDArray[np.float64]) -> ValueStatistics:
    positive = np.abs(values)[values != 0]
    return ValueStatistics(
        positions=len(values),
        minimum=float(values.min()),
        maximum=float(values.max()),
        smallest_magnitude=float(positive.min()) if len(positive) else math.inf,
        histogram=histogram_of(values) if len(positive) else Histogram(np.zeros(2048, np.int64), 1),
    )


def draws(kind: str, count: int = 20_000) -> NDArray[np.float64]:
    generator = np.random.default_rng(5)
    if kind == "normal":
        return generator.normal(0, 1.7, count)
    if kind == "laplace":
        return generator.laplace(0, 0.3, count)
    if kind == "heavy":
        return generator.standard_t(3, count)
    if kind == "rectified":
        return np.maximum(generator.normal(-0.2, 1, count), 0)
    return np.concatenate([generator.normal(0, 1, count), [20.0]])


KINDS = ("normal", "laplace", "heavy", "rectified", "outlier")


def published_divergence(counts: NDArray[np.float64], size: int) -> float:
    """KL(P || Q) of Migacz's pseudocode, bin by bin."""
    reference = list(counts[:size])
    reference[-1] += counts[size:].sum()
    members: list[list[int]] = [[] for _ in range(128)]
    for index in range(size):
        members[next(g for g in range(128) if (g + 1) * size > 128 * index)].append(index)
    quantized = [0.0] * size
    for level in members:
        occupied = [index for index in level if reference[index] > 0]
        mass = sum(counts[index] for index in level)
        for index in occupied:
            quantized[index] = mass / len(occupied)
    total, inside = sum(reference), sum(quantized)
    divergence = 0.0
    for p, q in zip(reference, quantized, strict=True):
        if p > 0 and q == 0:
            return math.inf
        if p > 0:
            divergence += p / total * math.log((p / total) / (q / inside))
    return divergence


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_the_published_algorithm(kind: str) -> None:
    histogram = histogram_of(draws(kind, 4000), bins=512)
    counts = histogram.counts[: np.flatnonzero(histogram.counts)[-1] + 1].astype(np.float64)
    counts[0] = counts[1]
    by_size = {size: published_divergence(counts, size) for size in range(128, len(counts) + 1)}
    chosen = round(entropy_threshold(histogram) / histogram.bin_width)
    assert by_size[chosen] <= min(by_size.values()) + 1e-12


def test_entropy_keeps_the_bulk_and_clips_an_outlier() -> None:
    assert 2.0 < threshold(ActivationMethod("entropy"), statistics_of(draws("outlier"))) < 10.0


def test_entropy_cannot_clip_to_fewer_bins_than_levels() -> None:
    """As published: a bulk within 128 of 2048 bins is out of its reach, and nothing is clipped."""
    values = np.append(np.random.default_rng(5).normal(0, 1, 20_000), 80.0)
    assert threshold(ActivationMethod("entropy"), statistics_of(values)) == 80.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
def test_percentile_is_the_inverse_distribution(kind: str, percentile: float) -> None:
    values = np.abs(draws(kind))
    histogram = histogram_of(values)
    exact = np.quantile(values, percentile / 100, method="inverted_cdf")
    found = percentile_threshold(histogram, percentile)
    assert exact < found <= exact + histogram.bin_width


def squared_error(values: NDArray[np.float64], limit: float) -> float:
    """Of symmetric INT8 on the values themselves, not on their histogram."""
    scale = limit / 127
    restored = np.clip(np.rint(values / scale), -127, 127) * scale
    return float(np.square(values - restored).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_the_best_of_a_thousand_thresholds(kind: str) -> None:
    values = draws(kind)
    amax = np.abs(values).max()
    found = squared_error(values, threshold(ActivationMethod("mse"), statistics_of(values)))
    tried = [squared_error(values, limit) for limit in np.linspace(amax / 1000, amax, 1000)]
    assert found <= 1.01 * min(tried)


@pytest.mark.parametrize("limit_bins", [3, 40, 127, 200, 255])
def test_the_error_of_evenly_spread_bins_is_integrated_exactly(limit_bins: int) -> None:
    """The chosen threshold's objective against a fine numerical integration."""
    from vlmport.calibration.observers import _squared_error

    counts = np.random.default_rng(1).integers(0, 50, 256).astype(np.float64)
    fine = (np.arange(256 * 4000) + 0.5) / 4000
    scale = limit_bins / 127
    error = np.square(fine - np.clip(np.rint(fine / scale), -127, 127) * scale)
    expected = float(error.reshape(256, -1).mean(axis=1) @ counts)
    found = _squared_error(counts, np.arange(257.0), float(limit_bins))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


values_strategy = st.lists(
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6),
    min_size=1,
    max_size=60,
).map(lambda items: np.array(items, np.float64))


@settings(deadline=None, max_examples=60)
@given(values_strategy, st.sampled_from(OBSERVERS))
def test_a_threshold_lies_between_zero_and_the_largest(
    values: NDArray[np.float64], observer: str
) -> None:
    statistics = statistics_of(values)
    found = threshold(ActivationMethod(observer), statistics)  # type: ignore[arg-type]
    assert 0.0 <= found <= statistics.amax
    assert (found == 0.0) == (statistics.amax == 0.0)


@settings(deadline=None, max_examples=60)
@given(values_strategy, st.sampled_from(OBSERVERS), st.integers(-8, 8))
def test_scaling_the_values_scales_the_threshold(
    values: NDArray[np.float64], observer: str, exponent: int
) -> None:
    method = ActivationMethod(observer)  # type: ignore[arg-type]
    scaled = threshold(method, statistics_of(values * 2.0**exponent))
    assert scaled == threshold(method, statistics_of(values)) * 2.0**exponent


@settings(deadline=None, max_examples=60)
@given(values_strategy, st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_higher_percentile_never_lowers_the_threshold(
    values: NDArray[np.float64], first: float, second: float
) -> None:
    low, high = sorted((first, second))
    statistics = statistics_of(values)
    of_low = threshold(ActivationMethod("percentile", percentile=low), statistics)
    assert of_low <= threshold(ActivationMethod("percentile", percentile=high), statistics)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_single_value_is_kept(observer: str) -> None:
    statistics = statistics_of(np.full(100, -3.3))
    assert statistics.histogram is not None
    found = threshold(ActivationMethod(observer), statistics)  # type: ignore[arg-type]
    assert 3.3 - statistics.histogram.bin_width <= found <= 3.3


@pytest.mark.parametrize("observer", OBSERVERS)
def test_nothing_but_zeros_has_the_threshold_zero(observer: str) -> None:
    method = ActivationMethod(observer)  # type: ignore[arg-type]
    assert threshold(method, statistics_of(np.zeros(10))) == 0.0


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(observer: str, bad: float) -> None:
    statistics = ValueStatistics(3, -1.0, bad, 0.5)
    with pytest.raises(CalibrationError, match="expected finite ones"):
        threshold(ActivationMethod(observer), statistics)  # type: ignore[arg-type]


def test_statistics_without_a_histogram_or_without_data_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no histogram"):
        threshold(ActivationMethod("mse"), ValueStatistics(3, -1.0, 1.0, 0.5))
    with pytest.raises(CalibrationError, match="never computed"):
        threshold(ActivationMethod("min_max"), ValueStatistics(0, math.inf, -math.inf, math.inf))
    with pytest.raises(CalibrationError, match="above 0"):
        percentile_threshold(Histogram(np.ones(4, np.int64), 1.0), 0.0)
    assert mse_threshold(Histogram(np.array([0, 0, 5], np.int64), 1.0)) <= 3.0
