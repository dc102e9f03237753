"""Masks of regions: from the mask decoder's small pictures to pixels of the user's picture."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.regions import Box, Region

__all__ = ["place_mask", "run_lengths", "with_masks"]


def with_masks(
    regions: Sequence[Region],
    size: tuple[int, int],
    decode: Callable[[NDArray[np.int64]], NDArray[np.float32]],
) -> tuple[Region, ...]:
    """Gives the regions that have codes their masks.

    Args:
        regions: of one picture.
        size: (height, width) of the picture in pixels.
        decode: the graph "mask_decoder": codes int64 [num_masks, codes_per_mask] -> float32
            [num_masks, mask_height, mask_width].
    """
    coded = [region for region in regions if region.codes]
    if not coded:
        return tuple(regions)
    masks = iter(decode(np.array([region.codes for region in coded], np.int64)))
    return tuple(
        replace(region, mask=place_mask(next(masks), region.box, size)) if region.codes else region
        for region in regions
    )


def place_mask(mask: NDArray[np.float32], box: Box, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Stretches a mask over its box.

    Args:
        mask: float32 [mask_height, mask_width]; above 0 is inside.
        box: in pixels of the picture; its edges are rounded to whole pixels.
        size: (height, width) of the picture.

    Returns:
        bool [height, width], False outside of the box.

    Source: google-research/big_vision, transfers/segmentation.py, which resizes bilinearly and
    takes what is above 0.
    """
    placed = np.zeros(size, np.bool_)
    top, bottom, left, right = (
        min(round(edge), limit)
        for edge, limit in (
            (box.y_min, size[0]),
            (box.y_max, size[0]),
            (box.x_min, size[1]),
            (box.x_max, size[1]),
        )
    )
    if bottom > top and right > left:  # in small pictures a thin box may hold no whole pixel
        target = (right - left, bottom - top)
        stretched = Image.fromarray(mask).resize(target, Image.Resampling.BILINEAR)
        placed[top:bottom, left:right] = np.asarray(stretched) > 0
    return placed


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of False, True, False, ... down the columns, from the left one on.

    Args:
        mask: bool [height, width].

    Source: cocodataset/cocoapi, mask API, uncompressed run-length encoding.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = [0, *changes.tolist(), flat.size]
    lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    return [0, *lengths] if flat.size and flat[0] else lengths
