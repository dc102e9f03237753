"""Reads a generated scene back from its pixels, so that answers can be checked against them."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from tiny.drawings import COLOURS
from tiny.scenes import Layout, Scene, scenes

__all__ = ["box_of", "ink_of", "inks_in", "some_scenes"]

INKS = sorted(COLOURS)
FEWEST_PIXELS = 20  # of a colour; a shape has at least 100


def some_scenes(layout: Layout, count: int, *, held_out: bool, seed: int = 5) -> list[Scene]:
    return list(itertools.islice(scenes(layout, seed, held_out=held_out), count))


def ink_of(scene: Scene, colour: str) -> NDArray[np.bool_]:
    """Marks the pixels that are no background and nearest to the colour: bool [height, width]."""
    table = np.array([COLOURS[name] for name in INKS], dtype=np.int64)
    distance = np.abs(scene.pixels.astype(np.int64)[:, :, None] - table).sum(-1)
    is_painted = (scene.pixels < 200).any(-1)  # a background has 220 and more
    nearest: NDArray[np.bool_] = distance.argmin(-1) == INKS.index(colour)
    return nearest & is_painted


def inks_in(scene: Scene) -> list[str]:
    """Lists the colours that the pixels show."""
    return [colour for colour in INKS if ink_of(scene, colour).sum() >= FEWEST_PIXELS]


def box_of(scene: Scene, colour: str) -> tuple[int, int, int, int]:
    """Returns top, left, bottom, right of a colour's pixels; bottom and right are exclusive."""
    rows, columns = np.nonzero(ink_of(scene, colour))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
