"""pixel_values are bit for bit those of transformers' image processors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import load_image as transformers_load_image

from vlmport.errors import InputError
from vlmport.export.processor_files import image_preprocessing
from vlmport.runtime.image_file import MAX_PIXELS, load_image
from vlmport.runtime.preprocessing import preprocess_image

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 56
SQUARE = {"height": SIDE, "width": SIDE}


def noise(width: int, height: int, mode: str) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
    if mode == "1":
        return noise(width, height, "L").convert("1")
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, (height, width), np.uint16))
    if mode == "P":
        return noise(width, height, "RGB").quantize(16)
    pixels = generator.integers(0, 256, (height, width, channels[mode]), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


PROCESSORS: dict[str, Any] = {
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "clip-odd-crop": CLIPImageProcessorPil(
        size={"shortest_edge": SIDE - 5}, crop_size={"height": SIDE, "width": SIDE}
    ),
    "llava-pad": LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, do_pad=True
    ),
}
SIZES = [(61, 83), (83, 61), (56, 56), (1, 1), (3, 2), (900, 20), (20, 900), (333, 334), (57, 56)]
MODES = ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "I;16"]


def check(name: str, path: Path) -> None:
    processor = PROCESSORS[name]
    steps = image_preprocessing(processor, pad_to_square=name == "llava-pad", side=SIDE)
    expected = processor(transformers_load_image(str(path)), return_tensors="np")["pixel_values"][0]
    found = preprocess_image(load_image(path), steps)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_equal_for_every_size(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    noise(*size, "RGB").save(tmp_path / "a.png")
    check(name, tmp_path / "a.png")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_equal_for_every_mode(name: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    noise(70, 45, mode).save(path)
    check(name, path)


def test_equal_for_a_palette_with_transparency(tmp_path: Path) -> None:
    noise(70, 45, "P").save(tmp_path / "a.png", transparency=3)
    check("siglip", tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_equal_for_every_exif_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(70, 45, "RGB").save(tmp_path / "a.jpg", exif=exif)
    check("clip", tmp_path / "a.jpg")
    turned = load_image(tmp_path / "a.jpg").size
    assert turned == ((45, 70) if orientation > 4 else (70, 45))


def test_equal_for_a_hundred_random_sizes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(100):
        width, height = (int(side) for side in generator.integers(1, 300, 2))
        noise(width, height, "RGB").save(tmp_path / "a.png")
        check(list(PROCESSORS)[index % len(PROCESSORS)], tmp_path / "a.png")


def test_open_image_is_taken_as_a_file_is() -> None:
    image = noise(70, 45, "RGBA")
    np.testing.assert_array_equal(load_image(image), transformers_load_image(image))


def test_strip_that_would_become_a_huge_picture_is_refused() -> None:
    processor = PROCESSORS["clip"]
    steps = image_preprocessing(processor, pad_to_square=False, side=SIDE)
    with pytest.raises(InputError, match=r"found 40000 x 1 pixels, which become"):
        preprocess_image(Image.new("RGB", (40000, 1)), steps)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="not a file"):
        load_image(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="not a picture that Pillow can read"):
        load_image(tmp_path / "text.png")
    noise(300, 300, "RGB").save(tmp_path / "whole.png")
    half = (tmp_path / "whole.png").read_bytes()[:5000]
    (tmp_path / "half.png").write_bytes(half)
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path / "half.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 14000])
def test_decompression_bomb_is_refused(side: int, tmp_path: Path) -> None:
    assert side * side > MAX_PIXELS
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=f"at most {MAX_PIXELS} (pixels )?are read"):
        load_image(tmp_path / "bomb.png")
