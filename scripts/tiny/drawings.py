"""Generates the drawings a tiny model is trained on: coloured shapes, a digit, a short word.

A drawing is a 2x2 grid of cells on a light background. Each cell holds at most one shape or the
digit; a word takes both cells of the top or the bottom half. No two things of a drawing share a
colour, and no two shapes share a name, so every question about it has one answer.

Whether a drawing is for training or held out follows from a hash of its pixels: the two can never
share a drawing, whatever seeds were used.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "COLOURS", "DIGITS", "PLACES", "SHAPES", "SIDE", "WORDS", "Drawing", "Item", "drawings",
    "is_held_out", "paint_shape", "shifted_ink",
]  # fmt: skip

SIDE = 128  # pixels; twice the tiny tower's image size, so that its resize has work to do
CELL = SIDE // 2

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "yellow": (235, 205, 20),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
PLACES = ("top left", "top right", "bottom left", "bottom right")
DIGITS = tuple("0123456789")
WORDS = (
    "bird", "boat", "cat", "cup", "dog", "egg",
    "fish", "hat", "key", "moon", "sun", "tree",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in a drawing.

    Attributes:
        kind: "shape", "digit" or "word".
        name: what it is: an element of SHAPES, DIGITS or WORDS.
        colour: a key of COLOURS.
        cells: indices into PLACES: one cell, or both cells of a half for a word.
    """

    kind: str
    name: str
    colour: str
    cells: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing and what is in it.

    Attributes:
        items: at most one digit and one word, and up to three shapes; may be empty.
        pixels: uint8 [SIDE, SIDE, 3], RGB.
    """

    items: tuple[Item, ...]
    pixels: NDArray[np.uint8]

    def of_kind(self, kind: str) -> list[Item]:
        """Lists the items of one kind, in the order they were drawn."""
        return [item for item in self.items if item.kind == kind]

    @property
    def image(self) -> Image.Image:
        """Returns the drawing as a PIL image in mode RGB."""
        return Image.fromarray(self.pixels)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Returns what a model is shown: this one image."""
        return (self.image,)


def drawings(seed: int, *, held_out: bool) -> Iterator[Drawing]:
    """Yields an endless, reproducible stream of drawings.

    Args:
        seed: two equal seeds give two equal streams.
        held_out: which side of the split to yield; one drawing in eight is held out.
    """
    rng = random.Random(seed)
    while True:
        items = _choose_items(rng)
        pixels = _paint(items, rng)
        if is_held_out(pixels) == held_out:
            yield Drawing(items, pixels)


def is_held_out(pixels: NDArray[np.uint8]) -> bool:
    """Tells a drawing's side of the split from its pixels alone."""
    return hashlib.sha256(pixels.tobytes()).digest()[0] < 32


def _choose_items(rng: random.Random) -> tuple[Item, ...]:
    """Fills the grid: perhaps a word, perhaps a digit, then shapes in cells still free."""
    colours = rng.sample(sorted(COLOURS), len(COLOURS))
    free = [0, 1, 2, 3]
    items = []
    if rng.random() < 0.45:
        half = rng.choice(((0, 1), (2, 3)))
        items.append(Item("word", rng.choice(WORDS), colours.pop(), half))
        free = [cell for cell in free if cell not in half]
    if rng.random() < 0.4:
        items.append(Item("digit", rng.choice(DIGITS), colours.pop(), (rng.choice(free),)))
        free = [cell for cell in free if cell not in items[-1].cells]
    fewest = 0 if items or rng.random() < 0.06 else 1
    count = rng.randint(fewest, min(3, len(free)))
    places = rng.sample(free, count)
    for name, cell in zip(rng.sample(SHAPES, count), places, strict=True):
        items.append(Item("shape", name, colours.pop(), (cell,)))
    return tuple(items)


def _paint(items: tuple[Item, ...], rng: random.Random) -> NDArray[np.uint8]:
    background = (rng.randint(220, 255), rng.randint(220, 255), rng.randint(220, 255))
    image = Image.new("RGB", (SIDE, SIDE), background)
    canvas = ImageDraw.Draw(image)
    for item in items:
        ink = shifted_ink(item.colour, rng)
        if item.kind == "shape":
            _paint_shape(canvas, item, ink, rng)
        else:
            _paint_text(canvas, item, ink, rng)
    return np.asarray(image)


def shifted_ink(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """Chooses a shade near the named colour."""
    red, green, blue = (_shift(channel, rng) for channel in COLOURS[colour])
    return red, green, blue


def _shift(channel: int, rng: random.Random) -> int:
    return min(255, max(0, channel + rng.randint(-18, 18)))


def _paint_shape(
    canvas: ImageDraw.ImageDraw, item: Item, ink: tuple[int, int, int], rng: random.Random
) -> None:
    radius = rng.randint(18, 26)
    slack = CELL // 2 - radius - 2
    x = item.cells[0] % 2 * CELL + CELL // 2 + rng.randint(-slack, slack)
    y = item.cells[0] // 2 * CELL + CELL // 2 + rng.randint(-slack, slack)
    paint_shape(canvas, item.name, (x, y), radius, ink)


def paint_shape(
    canvas: ImageDraw.ImageDraw,
    name: str,
    centre: tuple[float, float],
    radius: float,
    ink: tuple[int, int, int],
) -> None:
    """Paints an element of SHAPES into the square of half side `radius` around `centre`."""
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        canvas.ellipse(box, fill=ink)
    elif name == "square":
        canvas.rectangle(box, fill=ink)
    elif name == "triangle":
        canvas.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=ink)
    elif name == "cross":
        arm = radius // 3
        canvas.rectangle((box[0], y - arm, box[2], y + arm), fill=ink)
        canvas.rectangle((x - arm, box[1], x + arm, box[3]), fill=ink)
    else:
        canvas.polygon(_star(x, y, radius), fill=ink)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Lists the ten corners of a five-pointed star, the first at the top."""
    corners = []
    for corner in range(10):
        reach = radius if corner % 2 == 0 else radius * 0.42
        angle = math.pi * corner / 5
        corners.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return corners


def _paint_text(
    canvas: ImageDraw.ImageDraw, item: Item, ink: tuple[int, int, int], rng: random.Random
) -> None:
    """Writes a digit into its cell or a word into its half, wherever it fits."""
    font = _font(rng.randint(48, 58) if item.kind == "digit" else rng.randint(42, 50))
    left, top, right, bottom = canvas.textbbox((0, 0), item.name, font=font)
    column, row = item.cells[0] % 2, item.cells[0] // 2
    x = column * CELL + rng.uniform(2, max(2, len(item.cells) * CELL - (right - left) - 2))
    y = row * CELL + rng.uniform(2, max(2, CELL - (bottom - top) - 2))
    canvas.text((round(x - left), round(y - top)), item.name, fill=ink, font=font)


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the outline font that Pillow carries inside, the same on every machine."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        message = "Pillow was built without FreeType: its default font has no sizes"
        raise TypeError(message)
    return font
