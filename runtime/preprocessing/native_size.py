"""Pictures in their own aspect ratio, whole or in five tiles, as transformers makes them."""

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
        pixel_values float32 [num_tiles, 3, height, width], zero in the padding at the bottom and
        the right; patch_grid int64 [num_tiles, 2], rows and columns of whole patches of each tile.

    Raises:
        InputError: if the picture is too small to be split, or a tile is zero all over.

    Source: transformers' PIL image processor of this kind (split_images, resize, pad).
    """
    tiles = [_resized(tile, steps) for tile in _tiles(image, steps)]
    scales = steps.rescale_factor, steps.mean, steps.std
    values = [scaled(np.asarray(tile).transpose(2, 0, 1), *scales) for tile in tiles]
    if not all(tile.any() for tile in values):
        # The model takes a tile of zeros for padding of the batch, and would leave it out.
        msg = (
            f"image: found {image.width} x {image.height} pixels of which a part is zero all over "
            "after normalization, which the model takes for no picture; use another picture"
        )
        raise InputError(msg)
    patch = steps.patch_size
    grid = np.array([(t.height // patch, t.width // patch) for t in tiles], np.int64)
    pixel_values = _padded(values)
    rows, columns = (side // patch for side in pixel_values.shape[2:])
    return PreparedImage(
        {"pixel_values": pixel_values, "patch_grid": grid},
        ImageLayout(len(tiles), rows, columns),
        (image.height, image.width),
    )


def _tiles(image: Image.Image, steps: NativeSizeImages) -> list[Image.Image]:
    """The four quadrants in reading order and the whole, or the whole alone."""
    if not steps.is_split:
        return [image]
    width, height = image.size
    if min(width, height) < 2:
        msg = (
            f"image: found {width} x {height} pixels; a picture that is split into quadrants has "
            "2 x 2 pixels or more; enlarge it"
        )
        raise InputError(msg)
    x, y = width // 2, height // 2
    boxes = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    return [*(image.crop(box) for box in boxes), image]


def _resized(tile: Image.Image, steps: NativeSizeImages) -> Image.Image:
    width, height = tile.size
    # The aspect ratio is divided and multiplied as transformers does: int() of it is exact so.
    aspect_ratio = width / height
    if width >= height and width > steps.longest_edge:
        width = steps.longest_edge
        height = int(width / aspect_ratio)
    elif height > width and height > steps.longest_edge:
        height = steps.longest_edge
        width = int(height * aspect_ratio)
    size = (max(width, steps.shortest_edge), max(height, steps.shortest_edge))
    return tile.resize(size, Image.Resampling[steps.resample.upper()])


def _padded(tiles: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    height = max(tile.shape[1] for tile in tiles)
    width = max(tile.shape[2] for tile in tiles)
    padded = np.zeros((len(tiles), 3, height, width), np.float32)
    for index, tile in enumerate(tiles):
        padded[index, :, : tile.shape[1], : tile.shape[2]] = tile
    return padded
