"""What calibration data has shown of a value of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["GraphStatistics", "Histogram", "Probe", "Statistics", "ValueStatistics"]


@dataclass(frozen=True, slots=True)
class Probe:
    """What to collect of one value of a graph.

    Attributes:
        value: its name in the graph.
        channel_axis: axis of the channels; -1 but for the input of a Conv, where it is 1.
        channels: whether ranges of single channels are collected (SmoothQuant, AWQ).
        histogram: whether the distribution of magnitudes is collected (observers).
        second_moment: whether the sum of outer products of the channels is collected (AWQ, GPTQ);
            takes 4 x channels^2 bytes.
        first_position_weight: how often the first position of a sequence counts in the second
            moment. Attention rests on it far more often than it occurs.
    """

    value: str
    channel_axis: Literal[-1, 1] = -1
    channels: bool = True
    histogram: bool = False
    second_moment: bool = False
    first_position_weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of magnitudes |x| in bins of equal width that begin at 0.

    Attributes:
        counts: int64 [num_bins].
        bin_width: width of a bin.
    """

    counts: NDArray[np.int64]
    bin_width: float


@dataclass(frozen=True, slots=True, eq=False)
class ValueStatistics:
    """Statistics of one value over all calibration data; valid positions only, no padding.

    Attributes:
        positions: vectors of channels that were seen.
        minimum: smallest element.
        maximum: largest element.
        smallest_magnitude: smallest |x| > 0; infinity if all were 0.
        channel_amax: float32 [channels], largest |x| of each channel, or None.
        histogram: distribution of |x|, or None.
        second_moment: float32 [channels, channels], sum over positions of x x^T, the
            first of each sequence weighted as the probe says, or None.
    """

    positions: int
    minimum: float
    maximum: float
    smallest_magnitude: float
    channel_amax: NDArray[np.float32] | None = None
    histogram: Histogram | None = None
    second_moment: NDArray[np.float32] | None = None

    @property
    def amax(self) -> float:
        """Largest |x|."""
        return max(abs(self.minimum), abs(self.maximum))


# Value name -> statistics; graph name -> the same of its values.
GraphStatistics: TypeAlias = Mapping[str, ValueStatistics]
Statistics: TypeAlias = Mapping[str, GraphStatistics]
