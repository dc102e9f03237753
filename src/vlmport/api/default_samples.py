"""Calibration data that every installation has: photographs of two packages, and drawings."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vlmport.calibration.samples import CalibrationSample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["default_data_warning", "default_samples"]

_log = logging.getLogger(__name__)

_WARNING = (
    "calibration data: none given, so {photographs} photographs and {drawings} drawings stand in; "
    "a quantized bundle keeps more of its accuracy when it is calibrated on pictures and questions "
    "like those of its users"
)

# Package's folder -> photographs and scans that its wheel contains.
_PHOTOGRAPHS = {
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "skimage/data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "color.png",
        "grass.png",
        "gravel.png",
        "horse.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "page.png",
        "retina.jpg",
        "rocket.jpg",
        "text.png",
    ),
}
_PROMPTS = (
    "Describe this picture in detail.",
    "What is this?",
    "Which colours do you see, and where?",
    "How many things are in the picture? Count them.",
    "Is there a person in the picture? Answer yes or no.",
    "Read the text in the picture. If there is none, say so.",
    "What is in the top left, and what is in the bottom right?",
    "Name the largest thing in the picture, and say in one sentence why it stands out.",
    "Where was this picture taken, and at what time of the day? Give a reason for your answer.",
    "detect circle",
    "caption en",
    "Write a short title for this picture, e.g. 'Sunset over 12 hills', and nothing else.",
)
_WORDS = ("STOP", "Café 24", "Nr. 7381", "open 9-17", "naïve", "x = 3.14", "EXIT", "Total: 56")
_COLOURS = ("red", "navy", "gold", "seagreen", "purple", "black", "orange", "white", "skyblue")
_SIZES = ((224, 224), (336, 336), (384, 288), (320, 480), (512, 512), (640, 360), (97, 131))


def default_samples(count: int = 64) -> tuple[CalibrationSample, ...]:
    """Questions about photographs that are installed and about drawings; the same at every call.

    A warning is logged: the user's own data is better.

    Args:
        count: questions; the first few are about photographs, each its own, if there are any.
    """
    photographs = tuple(_photographs())[:count]
    drawings = count - len(photographs)
    _log.warning(default_data_warning(count))
    images: list[Path | Image.Image] = [*photographs, *map(_drawing, range(drawings))]
    return tuple(
        CalibrationSample(_name(image, index), (image,), _PROMPTS[index % len(_PROMPTS)])
        for index, image in enumerate(images)
    )


def default_data_warning(count: int = 64) -> str:
    """What the user is told when `default_samples` stand in for data of theirs."""
    photographs = min(count, len(tuple(_photographs())))
    return _WARNING.format(photographs=photographs, drawings=count - photographs)


def _name(image: Path | Image.Image, index: int) -> str:
    return image.name if isinstance(image, Path) else f"default drawing {index}"


def _photographs() -> Iterator[Path]:
    for folder, names in _PHOTOGRAPHS.items():
        package, _, below = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths = (Path(spec.origin).parent / below / name for name in names)
            yield from (path for path in paths if path.is_file())


def _drawing(index: int) -> Image.Image:
    """A scene on one of four grounds: plain, a gradient, stripes, or noise; text on every third."""
    generator = np.random.default_rng([2024, index])
    width, height = _SIZES[index % len(_SIZES)]
    image = Image.fromarray(_ground(index % 4, width, height, generator))
    draw = ImageDraw.Draw(image)
    for _ in range(int(generator.integers(1, 9))):
        _draw_shape(draw, width, height, generator)
    if index % 3 == 0:
        word = _WORDS[index // 3 % len(_WORDS)]
        size = max(10, height // int(generator.integers(4, 9)))
        place = (
            width * float(generator.uniform(0, 0.4)),
            height * float(generator.uniform(0, 0.8)),
        )
        draw.text(place, word, _colour(generator), font_size=size)
    return image


def _draw_shape(
    draw: ImageDraw.ImageDraw, width: int, height: int, generator: np.random.Generator
) -> None:
    left, top = generator.uniform(0, 0.8) * width, generator.uniform(0, 0.8) * height
    right = left + generator.uniform(0.08, 0.5) * width
    bottom = top + generator.uniform(0.08, 0.5) * height
    kind, fill = int(generator.integers(4)), _colour(generator)
    if kind == 0:
        draw.ellipse((left, top, right, bottom), fill=fill, outline=_colour(generator))
    elif kind == 1:
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif kind == 2:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=fill)
    else:
        draw.line((left, top, right, bottom), fill=fill, width=1 + width // 60)


def _colour(generator: np.random.Generator) -> str:
    return _COLOURS[int(generator.integers(len(_COLOURS)))]


def _ground(
    kind: int, width: int, height: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    first, second = generator.integers(0, 256, (2, 3))
    y, x = np.mgrid[0:height, 0:width]
    if kind == 0:
        share = np.zeros((height, width))
    elif kind == 1:
        share = (x / width + y / height) / 2
    elif kind == 2:
        share = ((x + 2 * y) // int(generator.integers(5, 40)) % 2).astype(np.float64)
    else:
        share = generator.random((height, width))
    blended = first + (second - first) * share[..., None]
    pixels: NDArray[np.uint8] = blended.astype(np.uint8)
    return pixels
