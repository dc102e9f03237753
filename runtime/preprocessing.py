"""Turns a picture into pixel_values, bit for bit as transformers' image processors do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from PIL import Image

from vlmport.errors import InputError
from vlmport.runtime.image_file import MAX_PIXELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.contract import ImagePreprocessing, Resize

__all__ = ["preprocess_image"]

# A resized picture of more pixels is never made whole if only its centre is kept.
_MAX_WHOLE_PIXELS = 2**24
# Of a strip's resized picture so many pixels are computed, a part at a time; some 10 s.
_MAX_RESIZED_PIXELS = 16 * MAX_PIXELS


def preprocess_image(image: Image.Image, steps: ImagePreprocessing) -> NDArray[np.float32]:
    """Applies the steps of a manifest.

    Args:
        image: RGB.
        steps: from the manifest.

    Returns:
        pixel_values float32 [3, height, width].

    Raises:
        InputError: if padding, or resizing by the shorter edge, would make too many pixels.

    Source: transformers/image_processing_backends.py (PilBackend) and image_transforms.py.
    """
    if steps.pad_to_square is not None:
        image = _squared(image, steps.pad_to_square)
    if steps.resize is not None:
        image = _resized(image, steps.resize, steps.center_crop)
    pixels: NDArray[np.generic] = np.asarray(image).transpose(2, 0, 1)
    if steps.center_crop is not None:
        pixels = _center_cropped(pixels, *steps.center_crop)
    if steps.rescale_factor is not None:
        # Through float64, as transformers: the product rounds once.
        pixels = (pixels.astype(np.float64) * steps.rescale_factor).astype(np.float32)
    values = pixels.astype(np.float32)
    if steps.mean is not None and steps.std is not None:
        mean, std = np.array(steps.mean, np.float32), np.array(steps.std, np.float32)
        values = ((values.T - mean) / std).T
    return np.ascontiguousarray(values)


def _squared(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > MAX_PIXELS:
        _refuse(image, (side, side), MAX_PIXELS)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _resized(image: Image.Image, resize: Resize, crop: tuple[int, int] | None) -> Image.Image:
    resample = Image.Resampling[resize.resample.upper()]
    if resize.mode == "exact":
        return image.resize((resize.width, resize.height), resample)
    long, short = max(image.size), min(image.size)
    longer = int(resize.height * long / short)
    is_tall = image.width <= image.height
    width, height = (resize.height, longer) if is_tall else (longer, resize.height)
    if width * height <= _MAX_WHOLE_PIXELS:
        return image.resize((width, height), resample)
    if crop is None:
        if width * height > MAX_PIXELS:
            _refuse(image, (width, height), MAX_PIXELS)
        return image.resize((width, height), resample)
    # Pillow's first pass makes width x image.height pixels.
    if width * height > _MAX_RESIZED_PIXELS or width * image.height > MAX_PIXELS:
        _refuse(image, (width, height), _MAX_RESIZED_PIXELS)
    if is_tall:
        return _tall_centre(image, height, width, crop[0], resample)
    return _wide_centre(image, height, width, crop[1], resample)


def _wide_centre(
    image: Image.Image, height: int, width: int, crop: int, resample: Image.Resampling
) -> Image.Image:
    """The columns around the centre of the picture resized to height x width.

    Pillow resizes columns first, rows then, and rounds to bytes in between (Resample.c,
    ImagingResampleInner), so the passes may be run apart without a change of a single bit.
    """
    left, right = _centre(width, crop)
    columns = image.resize((width, image.height), resample).crop((left, 0, right, image.height))
    return columns.resize((right - left, height), resample)


def _tall_centre(
    image: Image.Image, height: int, width: int, crop: int, resample: Image.Resampling
) -> Image.Image:
    """The rows around the centre; the second pass treats each column for itself."""
    top, bottom = _centre(height, crop)
    columns = image.resize((width, image.height), resample)
    centre = Image.new("RGB", (width, bottom - top))
    step = max(1, _MAX_WHOLE_PIXELS // height)
    for left in range(0, width, step):
        right = min(left + step, width)
        part = columns.crop((left, 0, right, image.height)).resize((right - left, height), resample)
        centre.paste(part.crop((0, top, right - left, bottom)), (left, 0))
    return centre


def _centre(length: int, crop: int) -> tuple[int, int]:
    """Where the centre crop will cut; the whole length if the crop is longer."""
    start = (length - crop) // 2
    return (start, start + crop) if start >= 0 else (0, length)


def _refuse(image: Image.Image, size: tuple[int, int], limit: int) -> NoReturn:
    msg = (
        f"image: found {image.width} x {image.height} pixels, which become {size[0]} x {size[1]}; "
        f"at most {limit} are made; cut the picture to a wider strip"
    )
    raise InputError(msg)


def _center_cropped(pixels: NDArray[np.generic], height: int, width: int) -> NDArray[np.generic]:
    found_height, found_width = pixels.shape[1:]
    top, left = (found_height - height) // 2, (found_width - width) // 2
    if top >= 0 and left >= 0:
        return pixels[:, top : top + height, left : left + width]
    padded_height, padded_width = max(height, found_height), max(width, found_width)
    padded = np.zeros((3, padded_height, padded_width), pixels.dtype)
    top_pad = math.ceil((padded_height - found_height) / 2)
    left_pad = math.ceil((padded_width - found_width) / 2)
    padded[:, top_pad : top_pad + found_height, left_pad : left_pad + found_width] = pixels
    top, left = top + top_pad, left + left_pad
    return padded[:, max(0, top) : top + height, max(0, left) : left + width]
