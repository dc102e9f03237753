"""What must hold in a manifest's image preprocessing beyond its types, for each kind of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vlmport.contract import (
    FixedSizeImages,
    ImagePreprocessing,
    NativeSizeImages,
    PatchImages,
)

__all__ = ["image_faults", "too_small"]


def image_faults(image: ImagePreprocessing) -> Iterator[str]:
    """All faults; none if the steps can be applied to any picture."""
    if isinstance(image, PatchImages):
        yield from _patch_faults(image)
    elif isinstance(image, NativeSizeImages):
        yield from _native_size_faults(image)
    else:
        yield from _fixed_size_faults(image)


def too_small(values: dict[str, int], *, least: int) -> Iterator[str]:
    """A line for each value below `least`, by the name of its field."""
    for field, value in values.items():
        if value < least:
            yield f"{field}: found {value}; expected {least} or more"


def _fixed_size_faults(image: FixedSizeImages) -> Iterator[str]:
    for channel, value in enumerate(image.pad_to_square or ()):
        if not 0 <= value <= 255:
            yield f"image.pad_to_square[{channel}]: found {value}; expected 0 to 255"
    sizes = {f"center_crop[{i}]": size for i, size in enumerate(image.center_crop or ())}
    if image.resize is not None:
        sizes |= {"resize.height": image.resize.height, "resize.width": image.resize.width}
    yield from too_small({f"image.{name}": size for name, size in sizes.items()}, least=1)
    yield from _shape_faults(image)
    yield from _scale_faults(image)


def _native_size_faults(image: NativeSizeImages) -> Iterator[str]:
    yield from too_small({"image.patch_size": image.patch_size}, least=1)
    # A smaller edge would have no whole patch, a longest edge below it could not be kept.
    yield from too_small({"image.shortest_edge": image.shortest_edge}, least=image.patch_size)
    yield from too_small({"image.longest_edge": image.longest_edge}, least=image.shortest_edge)
    yield from _scale_faults(image)


def _patch_faults(image: PatchImages) -> Iterator[str]:
    if not 0 <= image.padding_value <= 255:
        yield f"image.padding_value: found {image.padding_value}; expected 0 to 255"
    for axis, patch, most in (
        ("height", image.patch_height, image.max_height),
        ("width", image.patch_width, image.max_width),
    ):
        sizes = {f"image.patch_{axis}": patch, f"image.max_{axis}": most}
        yield from too_small(sizes, least=1)
        if patch >= 1 and most % patch:
            yield (
                f"image.max_{axis}: found {most}; expected a multiple of the patch's {patch}, "
                "since a picture of that size must become whole patches"
            )
    yield from _scale_faults(image)


def _shape_faults(image: FixedSizeImages) -> Iterator[str]:
    resize = image.resize
    by_edge = resize is not None and resize.mode == "shortest_edge"
    if resize is not None and by_edge and resize.height != resize.width:
        yield (
            f"image.resize: shortest_edge with height {resize.height} and width {resize.width}; "
            "expected both to be the length of the shorter edge"
        )
    square = image.pad_to_square is not None
    if image.center_crop is None and (resize is None or (by_edge and not square)):
        yield (
            'image: neither an "exact" resize nor a centre crop; expected one of them, since '
            'kind "fixed_size" means that every picture becomes a tensor of one shape'
        )


def _scale_faults(image: ImagePreprocessing) -> Iterator[str]:
    if (image.mean is None) != (image.std is None):
        yield "image.mean, image.std: one is null and one is not; expected both or neither"
    factor = () if image.rescale_factor is None else (image.rescale_factor,)
    for name, values in (("rescale_factor", factor), ("std", image.std or ())):
        for value in values:
            if not (math.isfinite(value) and value > 0):
                yield f"image.{name}: found {value}; expected a finite number above 0"
    for value in image.mean or ():
        if not math.isfinite(value):
            yield f"image.mean: found {value}; expected a finite number"
