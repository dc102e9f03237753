"""Pictures of one size for all, bit for bit as transformers' image processors make them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from PIL import Image

from vlmport.errors import InputError
from vlmport.runtime.image_file import MAX_PIXELS
from vlmport.runtime.preprocessing.pixels import scaled
from vlmport.runtime.preprocessing.prepared import ImageLayout, PreparedImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.contract import FixedSizeImages, Resize

__all__ = ["prepare_fixed_size"]


def prepare_fixed_size(image: Image.Image, steps: FixedSizeImages) -> PreparedImage:
    """Applies the steps of a manifest.

    Args:
        image: RGB.
        steps: from the manifest.

    Returns:
        pixel_values float32 [1, 3, height, width].

    Raises:
        InputError: if padding, or resizing by the shorter edge, would make too many pixels.

    Source: transformers/image_processing_backends.py (PilBackend) and image_transforms.py.
    """
    size = (image.height, image.width)
    if steps.pad_to_square is not None:
        image = _squared(image, steps.pad_to_square)
    if steps.resize is not None:
        image = _resized(image, steps.resize, steps.center_crop)
    pixels: NDArray[np.generic] = np.asarray(image).transpose(2, 0, 1)
    if steps.center_crop is not None:
        pixels = _center_cropped(pixels, *steps.center_crop)
    values = scaled(pixels, steps.rescale_factor, steps.mean, steps.std)
    return PreparedImage({"pixel_values": values[None]}, ImageLayout(1, 0, 0), size)


def _squared(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > MAX_PIXELS:
        _refuse(image, (side, side))
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
    if width * height <= MAX_PIXELS:
        return image.resize((width, height), resample)
    if short > 1 or crop is None or longer > MAX_PIXELS:
        _refuse(image, (width, height))
    return _line_centre(image, (width, height), crop, resample)


def _line_centre(
    image: Image.Image, size: tuple[int, int], crop: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """The centre, along the line, of a line of pixels resized to size (width, height).

    A picture one pixel wide or high is resized along the line and repeated across it, so the two
    passes may be run apart and cut in between without a change of a single bit. Of wider strips
    that does not hold: Pillow rounds between the passes, and which comes first depends on the
    sizes (13.0.0, measured: columns first for two of three random sizes whose result tells).
    """
    is_tall = image.width == 1
    longer, kept = (size[1], crop[0]) if is_tall else (size[0], crop[1])
    start = max(0, (longer - kept) // 2)
    end = min(start + kept, longer)
    if is_tall:
        line = image.resize((1, longer), resample).crop((0, start, 1, end))
        return line.resize((size[0], end - start), resample)
    line = image.resize((longer, 1), resample).crop((start, 0, end, 1))
    return line.resize((end - start, size[1]), resample)


def _refuse(image: Image.Image, size: tuple[int, int]) -> NoReturn:
    msg = (
        f"image: found {image.width} x {image.height} pixels, which become {size[0]} x {size[1]}; "
        f"at most {MAX_PIXELS} are made; cut the picture to a wider strip"
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
