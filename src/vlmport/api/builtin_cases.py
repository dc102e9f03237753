"""What a bundle and PyTorch are asked: the user's pictures and prompt, or built-in ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from vlmport.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Case", "builtin_cases", "make_cases"]

_SHORT = "What is this?"
_LONG = (
    "Look at the picture closely before you answer. Name every shape that you can see, say which "
    "colour it has and where it lies, count the shapes of each colour, and then say in one short "
    "sentence what the picture as a whole reminds you of. Numbers such as 3, 17 and 2048 and marks "
    "like ;:?! may appear in your answer, and so may words such as naïve, 東京 or café."
)


@dataclass(frozen=True, slots=True)
class Case:
    """One chat of one user turn.

    Attributes:
        name: for messages.
        content: the turn's parts in transformers' form: {"type": "image"}, or {"type": "text",
            "text": ...}.
        images: paths or Pillow images of any mode, in the order of the image parts.
    """

    name: str
    content: tuple[dict[str, str], ...]
    images: tuple[Path | Image.Image, ...]

    @property
    def prompt(self) -> str:
        """The text parts."""
        return "".join(part.get("text", "") for part in self.content)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat in transformers' form."""
        return [{"role": "user", "content": [dict(part) for part in self.content]}]

    def rgb_images(self) -> list[Image.Image]:
        """The images upright and in RGB, as transformers' own loading gives them."""
        return [_rgb(image) for image in self.images]

    def image_names(self) -> tuple[str, ...]:
        """Each image in words."""
        return tuple(
            image.name if isinstance(image, Path) else f"{image.width}x{image.height} {image.mode}"
            for image in self.images
        )


def make_cases(images: Sequence[Path], prompt: str | None, placeholder: str) -> tuple[Case, ...]:
    """The user's pictures and prompt as cases; built-in ones stand in for what is missing.

    Args:
        images: paths; all belong to one chat.
        prompt: one user turn, or None.
        placeholder: text in the prompt that stands for an image; without it, images come first.

    Raises:
        InputError: if the prompt has placeholders and their number is not that of the images.
    """
    if images and prompt is None:
        texts = {"short prompt": _SHORT, "long prompt": _LONG}
        return tuple(_case(name, text, images, placeholder) for name, text in texts.items())
    if images and prompt is not None:
        _check_placeholders(prompt, len(images), placeholder)
        return (_case("given images, given prompt", prompt, images, placeholder),)
    if prompt is None:
        return builtin_cases()
    if placeholder and (wanted := prompt.count(placeholder)):
        available = [image for case in builtin_cases() for image in case.images]
        some = [available[index % len(available)] for index in range(wanted)]
        return (_case("built-in images, given prompt", prompt, some, placeholder),)
    return tuple(_case(case.name, prompt, case.images, "") for case in builtin_cases())


def builtin_cases() -> tuple[Case, ...]:
    """None, one and two images of awkward sizes and modes, with short and long prompts."""
    return (
        _case("text only, short", "Hello!", (), ""),
        _case("small square", _SHORT, (_shapes(97, 97),), ""),
        _case("wide grayscale", "How bright is the left side?", (_ramp(331, 41).convert("L"),), ""),
        _case("tall with alpha", _LONG, (_translucent(53, 211),), ""),
        _case(
            "palette and tiny",
            "What do the two pictures have in common?",
            (_shapes(120, 75).convert("P"), _noise(5, 7)),
            "",
        ),
        _case("text only, long", _LONG, (), ""),
    )


def _check_placeholders(prompt: str, num_images: int, placeholder: str) -> None:
    found = prompt.count(placeholder) if placeholder else 0
    if found not in (0, num_images):
        msg = (
            f"prompt: found {found} of {placeholder!r} for {num_images} images; write one for each "
            "image, or none to have the images first"
        )
        raise InputError(msg)


def _case(name: str, prompt: str, images: Sequence[Path | Image.Image], placeholder: str) -> Case:
    content: list[dict[str, str]] = []
    if placeholder and placeholder in prompt:
        for index, text in enumerate(prompt.split(placeholder)):
            content += [{"type": "image"}] if index else []
            content += [{"type": "text", "text": text}] if text else []
    else:
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    return Case(name, tuple(content), tuple(images))


def _rgb(image: Path | Image.Image) -> Image.Image:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    return image.convert("RGB")


def _shapes(width: int, height: int) -> Image.Image:
    """A red disc, a blue bar and a green triangle on white."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 9, height // 7, width // 2, height // 2), fill=(200, 30, 40))
    draw.rectangle(
        (width * 5 // 8, height // 5, width * 7 // 8, height * 4 // 5), fill=(30, 60, 190)
    )
    corners = [
        (width // 6, height * 7 // 8),
        (width // 3, height * 5 // 8),
        (width // 2, height - 3),
    ]
    draw.polygon(corners, fill=(20, 140, 60))
    return image


def _ramp(width: int, height: int) -> Image.Image:
    """Colour gradients along both axes, with a period that no patch size divides."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1), (x * y) % 251)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _translucent(width: int, height: int) -> Image.Image:
    """Shapes whose alpha falls from opaque at the top to nothing at the bottom."""
    image = _shapes(width, height)
    alpha = np.repeat(np.linspace(255, 0, height).astype(np.uint8)[:, None], width, axis=1)
    image.putalpha(Image.fromarray(alpha))
    return image


def _noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)
