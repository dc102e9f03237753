"""From the distribution of an activation's magnitudes to the range that INT8 keeps of it.

Every observer is a pure function of a `Histogram` and gives a threshold: magnitudes beyond it are
clipped, the scale is threshold / 127. None of them sees more than the histogram, so a threshold is
right to the width of a bin.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vlmport.calibration.statistics import Histogram
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.calibration.recipe import ActivationMethod
    from vlmport.calibration.statistics import ValueStatistics

__all__ = ["entropy_threshold", "mse_threshold", "percentile_threshold", "threshold"]

_LARGEST_CODE = 127  # of symmetric INT8; -128 is not used, so that both signs have one range
_LEVELS = 128  # Migacz 2017: magnitudes of 8 bits and a sign
_MOST_BINS = 2048  # Migacz 2017; finer histograms are merged for the two observers that search


def threshold(method: ActivationMethod, statistics: ValueStatistics) -> float:
    """The largest magnitude that symmetric INT8 is to represent.

    Args:
        method: names the observer.
        statistics: of the value; all observers but "min_max" need its histogram.

    Returns:
        0 < threshold <= amax; 0.0 if every element was 0.

    Raises:
        CalibrationError: if nothing was seen, or it was not finite, or there is no histogram.
    """
    if statistics.positions == 0:
        msg = "statistics: the value was never computed; expected calibration data that reaches it"
        raise CalibrationError(msg)
    amax = statistics.amax
    if not (math.isfinite(statistics.minimum) and math.isfinite(statistics.maximum)):
        msg = (
            f"statistics: found values from {statistics.minimum} to {statistics.maximum}; expected "
            "finite ones; look for the sample that overflows"
        )
        raise CalibrationError(msg)
    if method.observer == "min_max" or amax == 0.0:
        return amax
    histogram = statistics.histogram
    if histogram is None:
        msg = (
            f"statistics: no histogram, which the observer {method.observer!r} reads; collect them "
            "again with one, or choose min_max"
        )
        raise CalibrationError(msg)
    if method.observer == "percentile":
        found = percentile_threshold(histogram, method.percentile)
    elif method.observer == "entropy":
        found = entropy_threshold(histogram)
    else:
        found = mse_threshold(histogram)
    return min(found, amax)


def percentile_threshold(histogram: Histogram, percentile: float) -> float:
    """The upper edge of the bin that holds the percentile of the magnitudes.

    The percentile is the smallest magnitude that at least `percentile` percent of all magnitudes
    do not exceed (the inverse of the empirical distribution, no interpolation).

    Args:
        histogram: of magnitudes, not empty.
        percentile: in percent, above 0, at most 100.

    Raises:
        CalibrationError: if the percentile is out of range.
    """
    if not 0.0 < percentile <= 100.0:
        msg = f"percentile: found {percentile}; expected a number above 0 and at most 100"
        raise CalibrationError(msg)
    cumulative = np.cumsum(histogram.counts)
    needed = math.ceil(percentile / 100.0 * float(cumulative[-1]))
    index = int(np.searchsorted(cumulative, max(needed, 1)))
    return (index + 1) * histogram.bin_width


def entropy_threshold(histogram: Histogram) -> float:
    """The threshold whose quantized distribution lies nearest by Kullback-Leibler divergence.

    For every number of bins i from 128 on: P is the first i bins, the counts beyond them added to
    the last one. Q is the first i bins without these, gathered into 128 levels of equal width and
    spread again evenly over the bins of a level that are not empty. The i with the least KL(P || Q)
    gives the threshold i x bin width; the largest such i among equals. A P that has counts where Q
    has none is infinitely far. A bulk that fills fewer than 128 bins because of a far outlier is
    out of reach, so that nothing is clipped then: that is the published algorithm.

    What this variant takes from where: the algorithm of Migacz 2017 ("8-bit Inference with
    TensorRT", GTC, pseudocode), on magnitudes and at most 2048 bins as there; levels that begin at
    ceil(level x i / 128), the first bin's count replaced by that of the second (0 is exact at every
    scale, so its share says nothing about the range) and the threshold at the bin's upper edge as
    in NVIDIA's pytorch-quantization and Model Optimizer. onnxruntime's `entropy` does the same on
    signed values with 128 levels for both signs together.
    """
    merged = _merged(histogram)
    counts = merged.counts.astype(np.float64)
    if len(counts) <= _LEVELS:
        return len(counts) * merged.bin_width
    counts[0] = counts[1]
    divergences = _divergences(counts)
    candidates = len(divergences)
    best = candidates - 1 - int(np.argmin(divergences[::-1]))
    return (_LEVELS + best) * merged.bin_width


def mse_threshold(histogram: Histogram) -> float:
    """The threshold with the least expected squared error of symmetric INT8, clipping included.

    Error: (x - s clip(round(x / s), -127, 127))^2 with s = threshold / 127, where magnitudes lie
    evenly spread within each bin; thresholds tried: upper edges of bins. The integral over a bin is
    exact: between 0 and x = n s + r, n = min(round(x / s), 127), it is n s^3 / 12 + r^3 / 3.

    Source: the L2 objective of Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for
    Efficient Inference", section 3.
    """
    merged = _merged(histogram)
    edges = np.arange(len(merged.counts) + 1, dtype=np.float64)  # in bins: no overflow of cubes
    counts = merged.counts.astype(np.float64)
    errors = [_squared_error(counts, edges, float(edge)) for edge in edges[1:]]
    best = len(errors) - 1 - int(np.argmin(errors[::-1]))
    return (best + 1) * merged.bin_width


def _squared_error(counts: NDArray[np.float64], edges: NDArray[np.float64], limit: float) -> float:
    """Summed squared error at the threshold `limit`; edges and limit in bins."""
    step = limit / _LARGEST_CODE
    codes = np.minimum(np.rint(edges / step), _LARGEST_CODE)
    integral = codes * (step**3 / 12.0) + (edges - codes * step) ** 3 / 3.0
    return float(np.diff(integral) @ counts)


def _divergences(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(P || Q), not normalized by P's constant parts, for 128, 129, .. len(counts) bins.

    Q is constant over the bins of a level that are not empty, so a level enters by its sum and
    its number of such bins alone: prefix sums give both, and a candidate costs 128 steps.
    """
    total = float(counts.sum())
    sizes = np.arange(_LEVELS, len(counts) + 1)
    starts = -(-np.arange(_LEVELS + 1)[None, :] * sizes[:, None] // _LEVELS)  # ceil
    sums = np.diff(_prefix(counts)[starts], axis=1)
    occupied = np.diff(_prefix(counts > 0)[starts], axis=1)
    last = counts[sizes - 1]
    outliers = total - _prefix(counts)[sizes]
    # sum over bins of P log P, where the last bin holds the outliers too
    entropy = _prefix(_x_log_x(counts))[sizes] - _x_log_x(last) + _x_log_x(last + outliers)
    # sum over bins of P log Q
    seen = sums > 0
    level = np.where(seen, sums, 1.0) / np.where(seen, occupied, 1.0)
    log_level = np.where(seen, np.log(level), 0.0)
    cross = (sums * log_level).sum(axis=1) + outliers * log_level[:, -1]
    inside = sums.sum(axis=1)
    # P is divided by the total, Q by what lies inside
    normalizer = np.log(np.maximum(inside, 1.0)) - math.log(total)
    divergences: NDArray[np.float64] = (entropy - cross) / total + normalizer
    unreachable = (last == 0) & (outliers > 0)
    divergences[unreachable] = np.inf
    # What rounding leaves of equal distributions must not choose among them.
    return np.maximum(divergences, 1e-12)


def _prefix(values: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _x_log_x(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = values * np.log(np.where(values > 0, values, 1.0))
    return result


def _merged(histogram: Histogram) -> Histogram:
    """The histogram up to its last count, bins merged in pairs to at most 2048 of them."""
    occupied = int(np.flatnonzero(histogram.counts)[-1]) + 1
    counts, width = histogram.counts[:occupied], histogram.bin_width
    while len(counts) > _MOST_BINS:
        even = np.pad(counts, (0, len(counts) % 2))
        counts, width = even.reshape(-1, 2).sum(axis=1), 2.0 * width
    return Histogram(counts, width)
