"""pixel_values are bit for bit those of transformers' image processors."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import load_image as transformers_load_image

from vlmport.contract import Resize
from vlmport.errors import InputError
from vlmport.export.processor_files import image_preprocessing
from vlmport.runtime.image_file import MAX_PIXELS, load_image
from vlmport.runtime.preprocessing import prepare_image

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
    found = prepare_image(load_image(path), steps).inputs["pixel_values"][0]
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


@pytest.mark.parametrize("mode", MODES)
def test_open_image_is_taken_as_a_file_is(mode: str) -> None:
    image = noise(70, 45, mode)
    np.testing.assert_array_equal(load_image(image), transformers_load_image(image))


def test_strip_that_would_become_a_huge_picture_is_refused() -> None:
    processor = PROCESSORS["clip"]
    steps = image_preprocessing(processor, pad_to_square=False, side=SIDE)
    with pytest.raises(InputError, match=r"found 80000 x 2 pixels, which become .* at most"):
        prepare_image(Image.new("RGB", (80000, 2)), steps)
    with pytest.raises(InputError, match=r"found 2000000 x 1 pixels, which become .* at most"):
        prepare_image(Image.new("RGB", (2_000_000, 1)), steps)


def test_strip_that_would_become_a_huge_square_is_refused() -> None:
    steps = image_preprocessing(PROCESSORS["llava-pad"], pad_to_square=True, side=SIDE)
    with pytest.raises(InputError, match=r"found 10000 x 1 pixels, which become 10000 x 10000"):
        prepare_image(Image.new("RGB", (10000, 1)), steps)


@pytest.mark.parametrize(
    "resample", ["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]
)
@pytest.mark.parametrize("size", [(900, 1), (1, 900), (131, 1), (1, 37)], ids=str)
@pytest.mark.parametrize("crop", [(56, 56), (23, 31), (70, 3000)], ids=str)
def test_line_of_pixels_is_equal_without_the_whole_picture(
    resample: Any, size: tuple[int, int], crop: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmport.runtime.preprocessing.fixed_size.MAX_PIXELS", 60_000)
    image = noise(*size, "RGB")
    processor: Any = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": crop[0], "width": crop[1]},
        resample=Image.Resampling[resample.upper()],
    )
    steps = replace(
        image_preprocessing(PROCESSORS["clip"], pad_to_square=False, side=SIDE),
        resize=Resize("shortest_edge", SIDE, SIDE, resample),
        center_crop=crop,
    )
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    found = prepare_image(image, steps).inputs["pixel_values"][0]
    np.testing.assert_array_equal(found, expected)


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
    with (
        Image.open(tmp_path / "half.png") as opened,
        pytest.raises(InputError, match="image: cannot be read"),
    ):
        load_image(opened)
    with pytest.raises(InputError, match="cannot be reached"):
        load_image("a" * 300)
    with pytest.raises(InputError, match=r"https://some.where/a.png: no such file.*this machine"):
        load_image("https://some.where/a.png")


def test_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(3, 3, "RGB").save(tmp_path / "a.png")

    def refuse(*_: object) -> None:  # root may read whatever its mode says
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match="no permission to read it"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_damaged_bytes_give_a_picture_or_a_message(kind: str, tmp_path: Path) -> None:
    noise(20, 15, "RGB").save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for place in generator.integers(0, min(len(damaged), 150), 4):
            damaged[place] = generator.integers(256)
        (tmp_path / "damaged").write_bytes(damaged)
        with contextlib.suppress(InputError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load_image(tmp_path / "damaged").mode == "RGB"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 14000])
def test_decompression_bomb_is_refused(side: int, tmp_path: Path) -> None:
    assert side * side > MAX_PIXELS
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=f"at most {MAX_PIXELS} (pixels )?are read"):
        load_image(tmp_path / "bomb.png")
