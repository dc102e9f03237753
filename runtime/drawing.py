"""Draws the regions of an answer on the user's picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.runtime.regions import Box, Region

__all__ = ["draw_regions"]

Colour = tuple[int, int, int]
# Okabe and Ito's palette without black: told apart by colour-blind readers too.
_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_MASK_SHARE = 0.45


def draw_regions(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """Draws boxes, masks and labels.

    Args:
        image: RGB, upright; stays as it is.
        regions: in pixels of the picture.

    Returns:
        RGB of the same size.
    """
    colours = [_COLOURS[index % len(_COLOURS)] for index in range(len(regions))]
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    for region, colour in zip(regions, colours, strict=True):
        if region.mask is not None:
            pixels[region.mask] *= 1 - _MASK_SHARE
            pixels[region.mask] += np.multiply(colour, _MASK_SHARE)
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    shorter = min(drawn.size)
    line = max(1, round(shorter / 150))
    font = ImageFont.load_default(max(10, shorter / 28))
    # Labels last, so that no box hides one.
    for region, colour in zip(regions, colours, strict=True):
        draw.rectangle(_corners(region.box, drawn.size), outline=colour, width=line)
    for region, colour in zip(regions, colours, strict=True):
        if region.label:
            _draw_label(draw, region, colour, font, drawn.size)
    return drawn


def _corners(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of the frame, inside of the picture."""
    left, right = (min(round(x), size[0] - 1) for x in (box.x_min, box.x_max))
    top, bottom = (min(round(y), size[1] - 1) for y in (box.y_min, box.y_max))
    return left, top, right, bottom


def _draw_label(
    draw: ImageDraw.ImageDraw, region: Region, colour: Colour, font: Any, size: tuple[int, int]
) -> None:
    """The label on its colour: above the box if there is room, else inside; never cut at a side."""
    left, top, _, _ = _corners(region.box, size)
    text_left, text_top, text_right, text_bottom = draw.textbbox((0, 0), region.label, font=font)
    margin = max(1, round((text_bottom - text_top) / 5))
    width = round(text_right - text_left) + 2 * margin
    height = round(text_bottom - text_top) + 2 * margin
    x = max(0, min(left, size[0] - width))
    y = top - height if top >= height else top
    y = max(0, min(y, size[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    # Perceived brightness, ITU-R BT.601.
    is_bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    ink = (0, 0, 0) if is_bright else (255, 255, 255)
    draw.text((x + margin - text_left, y + margin - text_top), region.label, fill=ink, font=font)
