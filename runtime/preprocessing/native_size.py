"""Pictures in their own aspect ratio, cut into tiles or whole, as NaViT towers take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmport.errors import InputError
from vlmport.runtime.preprocessing.pixels import scaled
from vlmport.runtime.preprocessing.prepared import ImageLayout, PreparedImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.contract import NativeSizeImages

__all__ = ["prepare_native_size"]


def prepare_native_size(image: Image.Image, steps: NativeSizeImages) -> PreparedImage:
    """Applies the steps of a manifest.

    Args:
        image: RGB.
        steps: from the manifest.

    Returns:
        pixel_values float32 [num_tiles, 3, height, width], smaller tiles padded with 0 at the
        bottom and the right; patch_counts int64 [num_tiles, 2], rows and columns of the patches
        that hold no padding.

    Raises:
        InputError: if the picture is too small to be cut into tiles, or a tile is zero all over.

    Source: transformers' PIL image processor of such models (split_images, resize, pad).
    """
    tiles = _quadrants(image) if steps.splits else [image]
    pixels = [_pixels(tile, steps) for tile in tiles]
    if not all(tile.any() for tile in pixels):
        # transformers takes a tile of zeros for padding, drops it, and fails on the prompt's count.
        msg = (
            f"image: found {image.width} x {image.height} pixels of which a whole tile is zero "
            "after normalization, which the model takes for no picture; use another picture"
        )
        raise InputError(msg)
    height, width = (max(tile.shape[axis] for tile in pixels) for axis in (1, 2))
    padded = np.zeros((len(pixels), 3, height, width), np.float32)
    for target, tile in zip(padded, pixels, strict=True):
        target[:, : tile.shape[1], : tile.shape[2]] = tile
    # A patch that is padded in part counts as padding.
    counts = [[length // steps.patch_size for length in tile.shape[1:]] for tile in pixels]
    return PreparedImage(
        {"pixel_values": padded, "patch_counts": np.array(counts, np.int64)},
        ImageLayout(tiles=len(tiles), rows=0, columns=0),
        (image.height, image.width),
    )


def _quadrants(image: Image.Image) -> list[Image.Image]:
    """The four quarters in reading order, then the whole."""
    width, height = image.size
    if width < 2 or height < 2:
        msg = (
            f"image: found {width} x {height} pixels; expected 2 x 2 or more, as the model looks "
            "at the four quarters of a picture; enlarge it"
        )
        raise InputError(msg)
    middle_x, middle_y = width // 2, height // 2
    boxes = [
        (left, top, right, bottom)
        for top, bottom in ((0, middle_y), (middle_y, height))
        for left, right in ((0, middle_x), (middle_x, width))
    ]
    return [*(image.crop(box) for box in boxes), image]


def _pixels(tile: Image.Image, steps: NativeSizeImages) -> NDArray[np.float32]:
    resample = Image.Resampling[steps.resample.upper()]
    resized = tile.resize(_target_size(*tile.size, steps), resample)
    values = np.asarray(resized).transpose(2, 0, 1)
    return scaled(values, steps.rescale_factor, steps.mean, steps.std)


def _target_size(width: int, height: int, steps: NativeSizeImages) -> tuple[int, int]:
    """(width, height): the longer edge shrunk to fit, then each edge at least the shortest one."""
    aspect_ratio = width / height
    if width >= height and width > steps.longest_edge:
        width = steps.longest_edge
        height = int(width / aspect_ratio)
    elif height > width and height > steps.longest_edge:
        height = steps.longest_edge
        width = int(height * aspect_ratio)
    return max(width, steps.shortest_edge), max(height, steps.shortest_edge)
