from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmport.api.default_samples import default_data_warning, default_samples
from vlmport.runtime.image_file import load_image


def test_photographs_come_first_and_drawings_fill_up(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples = default_samples(40)
    photographs = [s for s in samples if isinstance(s.images[0], Path)]
    drawings = [s for s in samples if isinstance(s.images[0], Image.Image)]
    assert len(samples) == 40
    assert list(samples) == photographs + drawings
    assert len(photographs) >= 10
    assert len({sample.name for sample in samples}) == 40
    assert len({sample.prompt for sample in samples}) >= 10
    for sample in samples:
        assert load_image(sample.images[0]).mode == "RGB"
    assert f"{len(photographs)} photographs and {len(drawings)} drawings" in caplog.text
    assert "like those of its users" in caplog.text


def test_they_are_the_same_at_every_call() -> None:
    for first, second in zip(default_samples(30), default_samples(30), strict=True):
        assert first.prompt == second.prompt
        if isinstance(first.images[0], Image.Image):
            np.testing.assert_array_equal(first.images[0], second.images[0])


def test_drawings_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed vlmport without the two packages."""
    find_spec = importlib.util.find_spec
    missing = ("sklearn", "skimage")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    samples = default_samples(24)
    pictures = [sample.images[0] for sample in samples]
    assert len({image.tobytes() for image in pictures if isinstance(image, Image.Image)}) == 24
    assert "0 photographs and 24 drawings" in default_data_warning(24)
