"""Real photographs and scans that scikit-learn and scikit-image bring along."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["PHOTOGRAPHS", "photograph"]

# Colour, grey, with transparency, large, small, wide and tall.
PHOTOGRAPHS = {
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "skimage/data": (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "hubble_deep_field.jpg",
        "logo.png",
        "motorcycle_left.png",
        "page.png",
        "retina.jpg",
        "rocket.jpg",
        "text.png",
    ),
}


def photograph(name: str) -> Path:
    """Path of one of `PHOTOGRAPHS`."""
    folder = next(folder for folder, names in PHOTOGRAPHS.items() if name in names)
    package, _, below = folder.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed; pip install '.[dev]'"
    assert spec.origin is not None
    return Path(spec.origin).parent / below / name
