from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from vlmport.runtime.drawing import draw_regions
from vlmport.runtime.regions import Box, Region

if TYPE_CHECKING:
    from numpy.typing import NDArray

GREY = (90, 90, 90)
FIRST = (230, 159, 0)


def drawn(size: tuple[int, int], *regions: Region) -> NDArray[np.uint8]:
    picture = draw_regions(Image.new("RGB", size, GREY), regions)
    assert picture.size == size
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_box_is_framed_and_the_rest_stays() -> None:
    pixels = drawn((200, 100), Region("", Box(20.0, 30.0, 60.0, 150.0), ()))
    changed = (pixels != GREY).any(axis=2)
    assert (pixels[changed] == FIRST).all()
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 60, 30, 150)
    assert not changed[25:55, 35:145].any()


def test_mask_tints_its_pixels_alone() -> None:
    mask = np.zeros((100, 200), np.bool_)
    mask[40:45, 70:90] = True
    pixels = drawn((200, 100), Region("", Box(20.0, 30.0, 60.0, 150.0), (), mask))
    tint = np.round(np.multiply(GREY, 0.55) + np.multiply(FIRST, 0.45))
    np.testing.assert_allclose(pixels[mask].astype(float), np.tile(tint, (100, 1)), atol=1)
    assert (pixels[30:40, 40:140] == GREY).all()


@pytest.mark.parametrize("box", [Box(0, 0, 30, 30), Box(70, 150, 100, 200), Box(0, 180, 99, 199)])
def test_label_lies_inside_of_the_picture(box: Box) -> None:
    plain = drawn((200, 100), Region("", box, ()))
    labelled = drawn((200, 100), Region("red circle", box, ()))
    changed = (plain != labelled).any(axis=2)
    height = np.nonzero(changed.any(axis=1))[0]
    width = np.nonzero(changed.any(axis=0))[0]
    assert 8 <= np.ptp(height) <= 25
    assert 40 <= np.ptp(width) <= 80
    # Dark letters on the region's colour.
    letters = labelled[changed].sum(axis=1) < 150
    assert 0.03 < letters.mean() < 0.5


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (500, 4), (2000, 1500)])
def test_every_size_of_picture_is_kept(size: tuple[int, int]) -> None:
    box = Box(0.0, 0.0, float(size[1]), float(size[0]))
    regions = [Region(f"thing {i} é", box, (), np.ones(size[::-1], np.bool_)) for i in range(9)]
    assert (drawn(size, *regions) != GREY).any()


def test_picture_of_the_user_stays_as_it_is() -> None:
    image = Image.new("RGB", (20, 20), GREY)
    draw_regions(image, [Region("a", Box(0, 0, 10, 10), (), np.ones((20, 20), np.bool_))])
    assert (np.asarray(image) == GREY).all()
