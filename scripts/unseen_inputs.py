"""Texts and pictures that nobody has asked about before, so that nothing of theirs is known."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["unseen_picture", "unseen_text"]

_WORDS = ("circle", "square", "red", "blue", "green", "left", "right", "above", "below", "small")


def unseen_text(random: np.random.Generator, words: int) -> str:
    """Words of a scene, in no order."""
    return " ".join(random.choice(_WORDS, words).tolist())


def unseen_picture(random: np.random.Generator) -> Image.Image:
    """Noise of 640 x 480 pixels."""
    return Image.fromarray(random.integers(0, 256, (480, 640, 3), np.uint8))
