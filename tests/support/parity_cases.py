"""Chats with 0, 1 and 2 pictures that rows of the parity table are made of."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlmport.api.builtin_cases import Case

__all__ = ["mixed_cases"]

_QUESTIONS = (
    "How many shapes are there? Which colour? And why do you think so?",
    "What is in the picture?",
    "Compare them.",
)
_SIZES = ((61, 83), (100, 31))


def mixed_cases() -> tuple[Case, ...]:
    """A prompt without a picture, one with one and one with two; none of their tokens equal."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (*s, 3), np.uint8)) for s in _SIZES]
    return tuple(
        Case(
            f"{count} images",
            (*({"type": "image"} for _ in range(count)), {"type": "text", "text": question}),
            tuple(images[:count]),
        )
        for count, question in enumerate(_QUESTIONS)
    )
