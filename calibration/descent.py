"""Improves a rounded weight: each integer and each scale in turn takes its best value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.calibration.rounding import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.calibration.rounding import IntegerRange

__all__ = ["descended"]

# The second sweep wins a quarter of what the first wins.
_SWEEPS = 2


def descended(
    weight: NDArray[np.float32],
    rounded: QuantizedWeight,
    second_moment: NDArray[np.float32],
    limits: IntegerRange,
    sweeps: int = _SWEEPS,
) -> QuantizedWeight:
    """Coordinate descent on tr(E^T H E), E the error of the weight, from a rounded weight on.

    GPTQ corrects the error of a row by later rows alone; here earlier ones answer too, and scales
    are fitted to the integers that were chosen. The error never grows.

    Args:
        weight: float32 [in_channels, out_channels].
        rounded: of the weight; not changed.
        second_moment: float32 [in_channels, in_channels], H, positive definite (damped).
        limits: the integers to use.
        sweeps: how often every integer and scale is visited.

    Returns:
        The improved weight, scales of the same type.

    Source: Behdin et al. 2023, "QuantEase", section 3, with the fit of scales added.
    """
    values, scale = rounded.values.copy(), rounded.scale.copy()
    block_size = len(values) // len(scale)
    # Half the derivative of the error by the rounded weight, with the sign turned.
    pull = np.asarray(second_moment @ (weight - dequantize(rounded)), np.float32)
    for _ in range(sweeps):
        for index in range(len(scale)):
            block = slice(index * block_size, (index + 1) * block_size)
            before = values[block] * scale[index].astype(np.float32)
            own, asked = second_moment[block, block], pull[block].copy()
            _step_integers(values[block], scale[index], own, asked, limits)
            scale[index] = _fitted(values[block], scale[index], own, asked)
            after = values[block] * scale[index].astype(np.float32)
            pull -= second_moment[:, block] @ (after - before)
    return QuantizedWeight(values, scale)


def _step_integers(
    values: NDArray[np.int8],
    scale: NDArray[Any],
    own: NDArray[np.float32],
    pull: NDArray[np.float32],
    limits: IntegerRange,
) -> None:
    """Gives each row of a block its best integers; changes `values` and keeps `pull` up to date."""
    step = scale.astype(np.float32)
    for row in range(len(values)):
        best = np.rint(values[row] + pull[row] / (own[row, row] * step))
        best = np.clip(best, limits.lowest, limits.highest)
        pull -= own[:, row, None] * ((best - values[row]) * step)
        values[row] = best


def _fitted(
    values: NDArray[np.int8],
    scale: NDArray[Any],
    own: NDArray[np.float32],
    pull: NDArray[np.float32],
) -> NDArray[Any]:
    """The scales of a block with the least error for its integers; the old where none is better."""
    integers = values.astype(np.float32)
    curvature = np.einsum("io,io->o", integers, own @ integers)
    slope = np.einsum("io,io->o", integers, pull)
    old = scale.astype(np.float32)
    new = old + slope / np.where(curvature > 0, curvature, 1)
    rounded = new.astype(scale.dtype)
    change = rounded.astype(np.float32) - old
    # The scale's own rounding may undo a small gain; positive scales stay well above zero.
    gains = (2 * slope - curvature * change) * change > 0
    return np.where(gains & (new > 0.5 * old), rounded, scale)
