"""The arithmetic on pixels that all kinds of preprocessing share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["scaled"]

Channels = tuple[float, float, float]


def scaled(
    pixels: NDArray[np.generic],
    rescale_factor: float | None,
    mean: Channels | None,
    std: Channels | None,
) -> NDArray[np.float32]:
    """Rescales and normalizes.

    Args:
        pixels: uint8 or float [3, height, width].
        rescale_factor: factor on the values, or None.
        mean: per channel, subtracted after rescaling; None (with std) for no normalization.
        std: per channel, divided by.

    Returns:
        float32 [3, height, width].

    Source: transformers/image_transforms.py, rescale and normalize.
    """
    if rescale_factor is not None:
        # Through float64, as transformers: the product rounds once.
        pixels = (pixels.astype(np.float64) * rescale_factor).astype(np.float32)
    values = pixels.astype(np.float32)
    if mean is not None and std is not None:
        means, deviations = np.array(mean, np.float32), np.array(std, np.float32)
        values = ((values.T - means) / deviations).T
    return np.ascontiguousarray(values)
