"""Pictures of any size for models that take rows of patches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmport.errors import InputError
from vlmport.runtime.preprocessing.pixels import scaled
from vlmport.runtime.preprocessing.prepared import ImageLayout, PreparedImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.contract import PatchImages

__all__ = ["prepare_patches"]


def prepare_patches(image: Image.Image, steps: PatchImages) -> PreparedImage:
    """Applies the steps of a manifest.

    Args:
        image: RGB.
        steps: from the manifest.

    Returns:
        image_patches float32 [num_patches, patch_height * patch_width * 3].

    Raises:
        InputError: if the picture is so narrow that nothing is left of it when it is shrunk.

    Source: transformers' image processor of models that take patches of pixels. There every
    picture is padded to the largest size and then cropped to whole patches; padding to whole
    patches at once gives the same pixels without the detour.
    """
    size = (image.height, image.width)
    image = _shrunk(image, steps)
    rows = math.ceil(image.height / steps.patch_height)
    columns = math.ceil(image.width / steps.patch_width)
    shape = (rows * steps.patch_height, columns * steps.patch_width, 3)
    pixels = np.full(shape, steps.padding_value, np.uint8)
    pixels[: image.height, : image.width] = np.asarray(image)
    values = scaled(pixels.transpose(2, 0, 1), steps.rescale_factor, steps.mean, steps.std)
    # transformers hands the factor over as a float32 tensor.
    scale = float(np.float32(image.height / size[0]))
    patches = _patches(values, rows, columns)
    return PreparedImage({"image_patches": patches}, ImageLayout(1, rows, columns, scale), size)


def _shrunk(image: Image.Image, steps: PatchImages) -> Image.Image:
    if image.width <= steps.max_width and image.height <= steps.max_height:
        return image
    factor = min(steps.max_height / image.height, steps.max_width / image.width)
    height, width = int(image.height * factor), int(image.width * factor)
    if not height or not width:
        msg = (
            f"image: found {image.width} x {image.height} pixels, which shrink to {width} x "
            f"{height} to fit {steps.max_width} x {steps.max_height}; expected at least one pixel "
            "each way; cut the picture to a wider strip"
        )
        raise InputError(msg)
    return image.resize((width, height), Image.Resampling[steps.resample.upper()])


def _patches(values: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """[3, height, width] -> [rows * columns, patch_height * patch_width * 3]."""
    _, height, width = values.shape
    patch = (height // rows, width // columns)
    grid = values.reshape(3, rows, patch[0], columns, patch[1])
    flat = grid.transpose(1, 3, 2, 4, 0).reshape(rows * columns, patch[0] * patch[1] * 3)
    return np.ascontiguousarray(flat)
