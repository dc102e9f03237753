"""Symmetric rounding of weights to INT8 and INT4: scales, integers and back.

Weights are [in_channels, out_channels] here. A scale holds for a block of neighbouring input
channels and one output channel; one block of all input channels is rounding per output channel.
Zero points are 0 and scales positive: TensorRT takes nothing else (IDequantizeLayer: "All scale
coefficients must have strictly positive values"), so the sign of a scale cannot be used to put the
largest weight on -8, the one level that INT4 has more on its negative side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = [
    "INT4",
    "INT8",
    "IntegerRange",
    "QuantizedWeight",
    "amax_scale",
    "dequantize",
    "round_to_nearest",
    "round_with",
    "searched_scale",
]


@dataclass(frozen=True, slots=True)
class IntegerRange:
    """The integers that a weight may become.

    Attributes:
        lowest: the smallest.
        highest: the largest.
        shares: the scales that are worth a try, as shares of the one that clips nothing.
    """

    lowest: int
    highest: int
    shares: tuple[float, ...]


# -128 stays unused, so that a weight and its negation round alike. With steps this fine, clipping
# a weight costs more than it wins.
INT8 = IntegerRange(-127, 127, (1.0,))
INT4 = IntegerRange(-8, 7, tuple(1 - 0.02 * step for step in range(21)))


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A rounded weight.

    Attributes:
        values: int8 [in_channels, out_channels], within an `IntegerRange`.
        scale: [blocks, out_channels], of the graph's element type, positive.
    """

    values: NDArray[np.int8]
    scale: NDArray[Any]


def amax_scale(block: NDArray[np.float32], limits: IntegerRange) -> NDArray[np.float64]:
    """The smallest scale of each output channel that clips nothing.

    Args:
        block: float32 [block_size, out_channels].
        limits: the integers to use.

    Returns:
        float64 [out_channels]; 0 where all weights are 0.
    """
    high = np.maximum(block.max(axis=0), 0).astype(np.float64) / limits.highest
    low = np.minimum(block.min(axis=0), 0).astype(np.float64) / limits.lowest
    scale: NDArray[np.float64] = np.maximum(high, low)
    return scale


def searched_scale(
    block: NDArray[np.float32],
    limits: IntegerRange,
    dtype: DTypeLike,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """The scale of each output channel with the smallest squared error, clipping where it pays.

    Args:
        block: float32 [block_size, out_channels].
        limits: the integers to use.
        dtype: element type of the scale, a float type.
        importance: float32 [block_size], weight of each input channel's squared error (the mean
            square of its activation); None for all alike.

    Returns:
        dtype [out_channels]; of the shares that are tried the best.
    """
    widest = amax_scale(block, limits)
    best = _positive(widest, dtype)
    least = np.full(block.shape[1], np.inf, np.float32)
    for share in limits.shares:
        scale = _positive(share * widest, dtype)
        error = np.square(block - _grid(block, scale, limits) * scale.astype(np.float32))
        total = error.sum(axis=0) if importance is None else importance @ error
        better = total < least
        best = np.where(better, scale, best)
        least = np.where(better, total, least)
    return best


def round_with(
    block: NDArray[np.float32], scale: NDArray[Any], limits: IntegerRange
) -> NDArray[np.int8]:
    """The nearest integers of a block, half to even.

    Args:
        block: float32 [block_size, out_channels] or [out_channels].
        scale: [out_channels], positive.
        limits: the integers to use.

    Returns:
        int8, the shape of the block.
    """
    return _grid(block, scale, limits).astype(np.int8)


def round_to_nearest(
    weight: NDArray[np.float32],
    block_size: int,
    limits: IntegerRange,
    dtype: DTypeLike,
    importance: NDArray[np.float32] | None = None,
) -> QuantizedWeight:
    """Rounds each weight for itself, with searched scales.

    Args:
        weight: float32 [in_channels, out_channels].
        block_size: input channels that share a scale; divides in_channels.
        limits: the integers to use.
        dtype: element type of the scales.
        importance: float32 [in_channels], as for `searched_scale`.

    Returns:
        The rounded weight.
    """
    starts = range(0, weight.shape[0], block_size)
    values = np.empty(weight.shape, np.int8)
    scale = np.empty((len(starts), weight.shape[1]), dtype)
    for index, start in enumerate(starts):
        rows = slice(start, start + block_size)
        shares = None if importance is None else importance[rows]
        scale[index] = searched_scale(weight[rows], limits, dtype, shares)
        values[rows] = round_with(weight[rows], scale[index], limits)
    return QuantizedWeight(values, scale)


def dequantize(weight: QuantizedWeight) -> NDArray[np.float32]:
    """The weights that the integers stand for.

    Returns:
        float32 [in_channels, out_channels].
    """
    block_size = weight.values.shape[0] // weight.scale.shape[0]
    scale = np.repeat(weight.scale.astype(np.float32), block_size, axis=0)
    return weight.values * scale


def _grid(
    block: NDArray[np.float32], scale: NDArray[Any], limits: IntegerRange
) -> NDArray[np.float32]:
    return np.clip(np.rint(block / scale.astype(np.float32)), limits.lowest, limits.highest)


def _positive(scale: NDArray[np.float64], dtype: DTypeLike) -> NDArray[Any]:
    """The scale in its element type; 1 for a block of zeros, never a denormal number."""
    # The smallest normal number of float16 is 2^-14; bfloat16 has float32's exponents.
    smallest = 2.0**-14 if np.dtype(dtype) == np.float16 else 2.0**-126
    return np.where(scale == 0, 1.0, np.maximum(scale, smallest)).astype(dtype)
