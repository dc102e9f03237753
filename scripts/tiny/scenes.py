"""Generates the drawings of PaliGemma, Idefics2 and Fuyu: coloured shapes on a grid of any size.

A scene is a light background with up to a few shapes whose boxes lie on a grid of square cells.
A `Layout` says which grids occur and how many cells a shape spans, so that each family gets
drawings that show what is peculiar to it and that a very small model learns in minutes.

The split into training and held-out drawings is that of `tiny.drawings`: by a hash of the pixels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tiny.drawings import COLOURS, SHAPES, is_held_out, paint_shape, shifted_ink

__all__ = ["Album", "Layout", "Scene", "Shape", "scenes"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the drawings of a family look like.

    Attributes:
        cell: side of a grid cell, pixels of the drawing.
        grids: the (rows, columns) that occur.
        spans: how many cells a shape may be wide and high.
        most_shapes: shapes in a drawing at most; also at most one a cell.
        has_twins: whether two shapes may share a name; no two shapes ever share a colour.
        fills_box: whether a shape fills its cells to the edge; else its size and place vary.
    """

    cell: int
    grids: tuple[tuple[int, int], ...]
    spans: tuple[int, ...] = (1,)
    most_shapes: int = 4
    has_twins: bool = False
    fills_box: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape of a scene.

    Attributes:
        name: an element of SHAPES.
        colour: a key of COLOURS.
        row, column: the top left cell of its box.
        span: cells that its box is wide and high.
    """

    name: str
    colour: str
    row: int
    column: int
    span: int

    def overlaps(self, other: Shape) -> bool:
        """Tells whether the boxes share a cell."""
        return (
            self.row < other.row + other.span
            and other.row < self.row + self.span
            and self.column < other.column + other.span
            and other.column < self.column + self.span
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """One drawing and what is in it.

    Attributes:
        rows, columns: the grid.
        shapes: in reading order of their top left cells.
        pixels: uint8 [rows * cell, columns * cell, 3], RGB.
    """

    rows: int
    columns: int
    shapes: tuple[Shape, ...]
    pixels: NDArray[np.uint8]

    @property
    def image(self) -> Image.Image:
        """Returns the drawing as a PIL image in mode RGB."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True, slots=True)
class Album:
    """The scenes that one question is about, in the order in which a model is shown them."""

    scenes: tuple[Scene, ...]

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Returns the scenes as PIL images in mode RGB."""
        return tuple(scene.image for scene in self.scenes)


def scenes(layout: Layout, seed: int, *, held_out: bool) -> Iterator[Scene]:
    """Yields an endless, reproducible stream of scenes.

    Args:
        layout: what they look like.
        seed: two equal seeds give two equal streams.
        held_out: which side of the split to yield; one drawing in eight is held out.
    """
    rng = random.Random(seed)
    while True:
        rows, columns = rng.choice(layout.grids)
        shapes = _choose_shapes(layout, rows, columns, rng)
        pixels = _paint(layout, rows, columns, shapes, rng)
        if is_held_out(pixels) == held_out:
            yield Scene(rows, columns, shapes, pixels)


def _choose_shapes(
    layout: Layout, rows: int, columns: int, rng: random.Random
) -> tuple[Shape, ...]:
    """Places shapes at random; one that would overlap another is tried again elsewhere."""
    most = min(layout.most_shapes, rows * columns)
    count = rng.randint(1, most) if rng.random() > 0.05 else 0
    colours = rng.sample(sorted(COLOURS), count)
    names = rng.choices(SHAPES, k=count) if layout.has_twins else rng.sample(SHAPES, count)
    placed: list[Shape] = []
    for name, colour in zip(names, colours, strict=True):
        for _ in range(50):
            span = rng.choice(layout.spans)
            row, column = rng.randint(0, rows - span), rng.randint(0, columns - span)
            shape = Shape(name, colour, row, column, span)
            if not any(shape.overlaps(other) for other in placed):
                placed.append(shape)
                break
    return tuple(sorted(placed, key=lambda shape: (shape.row, shape.column)))


def _paint(
    layout: Layout, rows: int, columns: int, shapes: tuple[Shape, ...], rng: random.Random
) -> NDArray[np.uint8]:
    background = (rng.randint(220, 255), rng.randint(220, 255), rng.randint(220, 255))
    image = Image.new("RGB", (columns * layout.cell, rows * layout.cell), background)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        side = shape.span * layout.cell
        x = shape.column * layout.cell + (side - 1) / 2
        y = shape.row * layout.cell + (side - 1) / 2
        radius = (side - 1) / 2
        if not layout.fills_box:
            radius *= rng.uniform(0.68, 0.88)
            slack = (side - 1) / 2 - radius
            x, y = x + rng.uniform(-slack, slack), y + rng.uniform(-slack, slack)
        paint_shape(canvas, shape.name, (x, y), radius, shifted_ink(shape.colour, rng))
    return np.asarray(image)
