from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmport.api.builtin_cases import builtin_cases, make_cases
from vlmport.errors import InputError


def test_they_have_no_one_and_two_images_of_several_modes() -> None:
    cases = builtin_cases()
    assert {len(case.images) for case in cases} == {0, 1, 2}
    images = [image for case in cases for image in case.images]
    assert {image.mode for image in images if isinstance(image, Image.Image)} == {
        "RGB",
        "L",
        "RGBA",
        "P",
    }
    assert len({len(case.prompt) for case in cases}) >= 4
    assert len({case.name for case in cases}) == len(cases)


def test_they_are_the_same_each_time() -> None:
    for one, other in zip(builtin_cases(), builtin_cases(), strict=True):
        assert one.messages == other.messages
        for left, right in zip(one.rgb_images(), other.rgb_images(), strict=True):
            assert np.array_equal(np.asarray(left), np.asarray(right))


def test_every_image_part_has_its_image() -> None:
    for case in builtin_cases():
        [message] = case.messages
        parts = [part["type"] for part in message["content"]]
        assert message["role"] == "user"
        assert parts.count("image") == len(case.images) == len(case.rgb_images())


def test_the_users_picture_and_prompt_make_one_case(tmp_path: Path) -> None:
    [case] = make_cases((tmp_path / "a.png", tmp_path / "b.png"), "Why?", "<image>")
    assert [part["type"] for part in case.content] == ["image", "image", "text"]
    assert case.image_names() == ("a.png", "b.png")
    assert case.prompt == "Why?"


def test_placeholders_say_where_the_images_stand(tmp_path: Path) -> None:
    images = (tmp_path / "a.png", tmp_path / "b.png")
    [case] = make_cases(images, "First <image> then <image>", "<image>")
    assert [part["type"] for part in case.content] == ["text", "image", "text", "image"]
    with pytest.raises(InputError, match="found 1 of '<image>' for 2 images; write one for each"):
        make_cases(images, "Only <image>", "<image>")


def test_a_picture_alone_gets_builtin_prompts(tmp_path: Path) -> None:
    cases = make_cases((tmp_path / "a.png",), None, "<image>")
    assert len(cases) == 2
    assert all(len(case.images) == 1 for case in cases)


def test_a_prompt_alone_gets_builtin_pictures() -> None:
    cases = make_cases((), "Why?", "<image>")
    assert {case.prompt for case in cases} == {"Why?"}
    assert {len(case.images) for case in cases} == {0, 1, 2}
    [two] = make_cases((), "<image> or <image>?", "<image>")
    assert len(two.images) == 2


def test_pictures_are_turned_upright_for_pytorch(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("L", (4, 9)).save(tmp_path / "turned.jpg", exif=exif)
    [case] = make_cases((tmp_path / "turned.jpg",), "Why?", "")
    [image] = case.rgb_images()
    assert (image.size, image.mode) == ((9, 4), "RGB")
