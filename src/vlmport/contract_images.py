"""How pictures become arrays: one value for each kind of preprocessing that a manifest may name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

__all__ = [
    "FixedSizeImages",
    "ImagePreprocessing",
    "NativeSizeImages",
    "PatchImages",
    "Resize",
]

# An unknown key in a manifest is a fault: a newer writer meant something that we would ignore.
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Resize:
    """How an image is brought to size.

    Attributes:
        mode: "exact" resizes to height x width; "shortest_edge" keeps the aspect ratio and brings
            the shorter edge to `height` (equal to `width`).
        height: pixels.
        width: pixels.
        resample: Pillow's filter.
    """

    __pydantic_config__ = _STRICT
    mode: Literal["exact", "shortest_edge"]
    height: int
    width: int
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


@dataclass(frozen=True, slots=True)
class FixedSizeImages:
    """How every picture becomes pixel_values float32 [1, 3, height, width] of one size.

    The steps run in this order: RGB, pad to a square, resize, centre crop, rescale, normalize.

    Attributes:
        kind: "fixed_size".
        pad_to_square: colour (red, green, blue; 0-255) of the border that makes the picture square,
            or None to leave its shape.
        resize: None leaves the size.
        center_crop: (height, width) in pixels, or None.
        rescale_factor: factor on the 0-255 values, or None.
        mean: per channel, subtracted after rescaling; None (with std) for no normalization.
        std: per channel, divided by.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["fixed_size"]
    pad_to_square: tuple[int, int, int] | None
    resize: Resize | None
    center_crop: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class PatchImages:
    """How a picture becomes image_patches float32 [num_patches, patch_height * patch_width * 3].

    The steps run in this order: RGB, shrink to fit max_height x max_width with the same aspect
    ratio (never enlarge), pad at the right and the bottom to whole patches, rescale, normalize, cut
    into patches, rows from top to bottom and patches of a row from left to right.

    Attributes:
        kind: "patches".
        patch_height: pixels.
        patch_width: pixels.
        patch_axes: order of the values in a patch, the last axis varying fastest.
        max_height: pixels; a multiple of patch_height.
        max_width: pixels; a multiple of patch_width.
        resample: Pillow's filter for shrinking.
        padding_value: of every channel (0-255, before rescaling).
        rescale_factor: factor on the 0-255 values, or None.
        mean: per channel, subtracted after rescaling; None (with std) for no normalization.
        std: per channel, divided by.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["patches"]
    patch_height: int
    patch_width: int
    patch_axes: Literal["height_width_channels"]
    max_height: int
    max_width: int
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
    padding_value: int
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class NativeSizeImages:
    """How a picture becomes pixel_values float32 [num_tiles, 3, height, width] of its own shape.

    The steps run in this order: RGB, cut into tiles, resize each, rescale, normalize, pad all tiles
    of the picture to one size. With the pixels goes patch_counts int64 [num_tiles, 2].

    Attributes:
        kind: "native_size".
        splits: whether the picture is cut into its four quarters, with the whole as fifth tile.
        shortest_edge: pixels that both edges have at least.
        longest_edge: pixels to which a longer edge is shrunk, the aspect ratio kept.
        patch_size: pixels of a patch's side.
        resample: Pillow's filter.
        rescale_factor: factor on the 0-255 values, or None.
        mean: per channel, subtracted after rescaling; None (with std) for no normalization.
        std: per channel, divided by.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["native_size"]
    splits: bool
    shortest_edge: int
    longest_edge: int
    patch_size: int
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


# One dataclass for each kind of preprocessing; `kind` tells them apart in JSON.
ImagePreprocessing = FixedSizeImages | NativeSizeImages | PatchImages
