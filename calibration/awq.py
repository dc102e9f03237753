"""AWQ: input channels that carry much are scaled up before rounding, exactly compensated before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.calibration.gptq import output_error
from vlmport.calibration.rounding import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from vlmport.calibration.rounding import QuantizedWeight

__all__ = ["EXPONENTS", "SearchedScale", "channel_scale", "scaled_moment", "search_scale"]

# Lin et al. 2023, equation 5: 0 scales nothing, 1 makes all channels carry alike.
EXPONENTS = tuple(step / 10 for step in range(11))
# A channel counts with at least this share of the largest, so that one that was always zero does
# not get a scale that no weight survives.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class SearchedScale:
    """The best scale that was tried.

    Attributes:
        scale: float32 [in_channels], what the weights' rows are multiplied by.
        exponent: the one of `EXPONENTS` that it comes from.
        gain: output error with the scale over that without one, on the weights of the search.
    """

    scale: NDArray[np.float32]
    exponent: float
    gain: float


def channel_scale(
    magnitude: NDArray[np.float64], groups: NDArray[np.int64], exponent: float
) -> NDArray[np.float32]:
    """A power of the magnitudes, the largest and the smallest each other's inverse.

    Args:
        magnitude: float64 [in_channels], root mean square of each activation channel.
        groups: int64 [in_channels], the first channel of those that share a scale.
        exponent: 0 to 1.

    Returns:
        float32 [in_channels], > 0, equal within a group.

    Source: Lin et al. 2023, "AWQ", equation 4, with the root mean square for the mean magnitude,
    which is what the second moment holds.
    """
    squares = np.zeros(len(groups))
    np.add.at(squares, groups, np.square(magnitude))
    shared = np.sqrt(squares / np.maximum(np.bincount(groups, minlength=len(groups)), 1))[groups]
    if not shared.any():
        return np.ones(len(groups), np.float32)
    scale = np.maximum(shared, _LEAST_SHARE * shared.max()) ** exponent
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()), np.float32)


def scaled_moment(
    second_moment: NDArray[np.float32], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The second moment of x / scale, from that of x."""
    inverse = (1 / scale.astype(np.float64)).astype(np.float32)
    scaled: NDArray[np.float32] = second_moment * inverse[:, None] * inverse
    return scaled


def search_scale(
    weights: Sequence[NDArray[np.float32]],
    second_moment: NDArray[np.float32],
    positions: int,
    groups: NDArray[np.int64],
    round_: Callable[[int, NDArray[np.float32], NDArray[np.float32]], QuantizedWeight],
) -> SearchedScale:
    """Tries the scales of `EXPONENTS` on layers that read the same activation.

    Args:
        weights: float32 [in_channels, out_channels] of each layer; some output channels suffice.
        second_moment: float32 [in_channels, in_channels] of their activation, a sum of x x^T.
        positions: how many x the sum has.
        groups: int64 [in_channels], the first channel of those that share a scale.
        round_: rounds a scaled weight: place in `weights`, weight, scaled second moment.

    Returns:
        The scale with the least squared error of the outputs.
    """
    magnitude = np.sqrt(np.diagonal(second_moment).astype(np.float64) / max(positions, 1))
    best: SearchedScale | None = None
    unscaled = least = np.inf
    for exponent in EXPONENTS:
        scale = channel_scale(magnitude, groups, exponent)
        moment = scaled_moment(second_moment, scale)
        error = 0.0
        for place, weight in enumerate(weights):
            scaled = weight * scale[:, None]
            rounded = dequantize(round_(place, scaled, moment))
            error += float(output_error(scaled, rounded, moment).sum())
        unscaled = error if best is None else unscaled
        if best is None or error < least:
            least = error
            best = SearchedScale(scale, exponent, error / unscaled if unscaled > 0 else 1.0)
    assert best is not None
    return best
