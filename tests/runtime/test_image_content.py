from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmport.errors import InputError
from vlmport.runtime import image_file
from vlmport.runtime.image_file import image_content, load_image


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_bytes_are_taken_as_a_file_is(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(noise(0), kind, exif=exif)
    (tmp_path / "a").write_bytes(content)
    found = load_image(content)
    assert found.size == (20, 30)
    assert found.tobytes() == load_image(tmp_path / "a").tobytes()
    for source in (content, tmp_path / "a", str(tmp_path / "a")):
        assert image_content(source).load().tobytes() == found.tobytes()


def test_what_is_no_picture_is_refused() -> None:
    for content in (b"", b"not a picture"):
        with pytest.raises(InputError, match=r"^image: not a picture that Pillow can read"):
            load_image(content)
        with pytest.raises(InputError, match=r"^image: not a picture that Pillow can read"):
            image_content(content).load()
    with pytest.raises(InputError, match=r"^image: cannot be read .* the file is damaged"):
        load_image(encoded(noise(0))[:800])


def test_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "MAX_PIXELS", 599)
    with pytest.raises(InputError, match=r"^image: found 30 x 20 pixels; at most 599 are read"):
        load_image(encoded(noise(0)))


def test_equal_encoded_pictures_have_one_digest(tmp_path: Path) -> None:
    content = encoded(noise(0))
    (tmp_path / "a.png").write_bytes(content)
    digest = image_content(content).digest
    assert image_content(tmp_path / "a.png").digest == digest
    assert image_content(str(tmp_path / "a.png")).digest == digest
    (tmp_path / "a.png").write_bytes(encoded(noise(1)))
    assert image_content(tmp_path / "a.png").digest != digest


def test_a_file_that_changes_afterwards_is_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0)))
    content = image_content(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(encoded(noise(1)))
    assert content.load().tobytes() == noise(0).tobytes()


def test_open_images_are_told_apart_by_what_the_model_sees() -> None:
    digest = image_content(noise(0)).digest
    assert image_content(noise(0)).digest == digest
    assert image_content(noise(0, "RGBA")).digest == digest
    assert image_content(noise(1)).digest != digest
    assert image_content(noise(0).transpose(Image.Transpose.ROTATE_180)).digest != digest
    assert image_content(noise(0, "L")).digest != digest
    black = [Image.new("RGB", size) for size in ((20, 30), (30, 20))]
    assert image_content(black[0]).digest != image_content(black[1]).digest
    turned = noise(0)
    turned.getexif()[0x0112] = 3
    assert image_content(turned).digest != digest


def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no such file"):
        image_content(tmp_path / "nothing.png")
    (tmp_path / "a.png").write_bytes(encoded(noise(0)))
    for error, message in (
        (PermissionError(13, "Permission denied"), "no permission to read it"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"),
    ):

        def refuse(_: Path, error: OSError = error) -> bytes:
            raise error

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(InputError, match=message):
            image_content(tmp_path / "a.png")
