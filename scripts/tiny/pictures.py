"""Images on their way into a tiny model, and other small things that the families share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["normalized", "resized", "whole_number"]


def resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Tensor:
    """Resizes as the image processors do: with PIL, on uint8.

    Args:
        image: an image in mode RGB.
        size: width and height, pixels.
        resample: the filter.

    Returns:
        uint8 [3, height, width].
    """
    return torch.from_numpy(np.array(image.resize(size, resample))).permute(2, 0, 1)


def normalized(images: Sequence[Tensor]) -> Tensor:
    """Does the processors' arithmetic: from 0..255 to -1..1.

    Args:
        images: uint8 [3, height, width], all of one size.

    Returns:
        float32 [batch, 3, height, width].
    """
    return (torch.stack(list(images)).float() / 255 - 0.5) / 0.5


def whole_number(name: str, value: object) -> int:
    """Narrows what transformers and tokenizers declare as wider than a whole number."""
    if not isinstance(value, int):
        message = f"{name}: found {value!r}; a tiny model needs one whole number here"
        raise TypeError(message)
    return value
