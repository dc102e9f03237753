"""Patches, token ids and rows of images equal those of transformers' processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import skimage.data
import transformers
from PIL import Image
from sklearn.datasets import load_sample_image
from support.fuyu_checkpoints import IMAGE_TOKEN_ID, FuyuRecipe, make_fuyu_checkpoint
from tokenizers import Tokenizer

from vlmport.contract import PatchImages
from vlmport.errors import InputError
from vlmport.export.checkpoint import open_checkpoint
from vlmport.export.families.fuyu import FAMILY
from vlmport.runtime.image_file import load_image
from vlmport.runtime.messages import parse_messages
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.prompt import PromptEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.export.family import ExportPlan

PHOTOGRAPHS = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket", "camera", "logo")
# (width, height)
SIZES = (
    (300, 300),
    (1920, 30),
    (30, 1920),
    (1920, 1080),
    (1080, 1920),
    (3000, 2000),
    (2000, 3000),
    (1, 1),
    (29, 31),
    (30, 30),
    (31, 29),
    (1, 1080),
    (1921, 5),
    (1919, 1079),
    (1922, 1081),
    (4001, 13),
)
TEXTS = (
    "Generate a coco-style caption.\n",
    "",
    " What is in the picture?",
    "Was ist das? 東京 naïve 12 345 |NEWLINE| <s> </s> <0x04> <0x41>",
    "two\n\nlines  and   spaces ",
)


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 5000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def photograph(name: str) -> Image.Image:
    is_sample = name in ("china", "flower")
    array = load_sample_image(f"{name}.jpg") if is_sample else getattr(skimage.data, name)()
    return load_image(Image.fromarray(array))


class Side:
    """A checkpoint's processor beside the runtime's."""

    def __init__(self, path: Path) -> None:
        self.plan: ExportPlan = FAMILY.plan(open_checkpoint(path))
        self.reference: Any = self.plan.reference()
        self.encoder = PromptEncoder(
            Tokenizer.from_str(self.plan.tokenizer.to_str()),
            self.plan.prompt,
            self.plan.special_tokens,
        )

    def check(self, content: list[dict[str, str]], images: list[Image.Image]) -> None:
        """The reference's processor is transformers' own, see `FuyuReference`."""
        theirs = self.reference.greedy_inputs(content, images)
        ours = [prepare_image(image, self.plan.image) for image in images]
        if images:
            patches = np.concatenate([one.inputs["image_patches"] for one in ours])
            expected = theirs["pixel_values"].numpy()
            assert patches.dtype == expected.dtype
            np.testing.assert_array_equal(patches, expected)
        messages = parse_messages([{"role": "user", "content": content}])
        prompt = self.encoder.encode(messages, [one.layout for one in ours])
        expected = theirs["input_ids"][0].numpy()
        np.testing.assert_array_equal(prompt.input_ids, expected)
        np.testing.assert_array_equal(prompt.image_mask, expected == IMAGE_TOKEN_ID)
        # All positions count from 0 and no token is masked.
        assert theirs["attention_mask"].all()


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Side:
    recipe = FuyuRecipe(
        patch=30, max_height=1080, max_width=1920, numbers=1000, max_length=16384, layers=1
    )
    return Side(make_fuyu_checkpoint(tmp_path_factory.mktemp("full") / "checkpoint", recipe))


def turn(text: str, num_images: int) -> list[dict[str, str]]:
    return [{"type": "image"}] * num_images + [{"type": "text", "text": text}]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("text", TEXTS[:2])
def test_photographs(full_size: Side, name: str, text: str) -> None:
    full_size.check(turn(text, 1), [photograph(name)])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(full_size: Side, size: tuple[int, int]) -> None:
    text = TEXTS[SIZES.index(size) % len(TEXTS)]
    full_size.check(turn(text, 1), [noise(*size)])


@pytest.mark.parametrize("text", TEXTS)
def test_texts_without_an_image(full_size: Side, text: str) -> None:
    full_size.check(turn(text, 0), [])


@pytest.mark.parametrize("text", TEXTS)
def test_texts_with_two_images(full_size: Side, text: str) -> None:
    full_size.check(turn(text, 2), [noise(61, 83), noise(200, 31)])


def test_images_between_texts(full_size: Side) -> None:
    text, image = [{"type": "text", "text": "and this "}], [{"type": "image"}]
    pictures = [noise(35, 90), noise(3000, 100), photograph("coffee")]
    for content in (image + text + image + text + image, text + image * 2 + text + image):
        full_size.check(content, pictures)
    full_size.check(text + image, pictures[:1])


@pytest.mark.parametrize(
    "text",
    [
        "Read <box>100, 20, 300, 410</box>",
        "<point>13, 14</point> What is it?",
        "from <point>1, 2</point> to <box>3, 4, 55.5, 6</box> and back</box>",
        "</box>",
        "a <0x00>7, 8, 9, 10<0x01>",
    ],
)
@pytest.mark.parametrize("size", [(400, 300), (3000, 2000)])
def test_boxes_and_points(full_size: Side, text: str, size: tuple[int, int]) -> None:
    full_size.check(turn(text, 1), [noise(*size)])


def test_a_box_and_two_images_of_one_scale(full_size: Side) -> None:
    full_size.check(turn("<box>1, 2, 3, 4</box>?", 2), [noise(50, 40), noise(90, 30)])


def test_a_box_and_two_images_of_different_scale_are_refused(full_size: Side) -> None:
    with pytest.raises(InputError, match="cannot be told which picture is meant"):
        full_size.check(turn("<box>1, 2, 3, 4</box>", 2), [noise(50, 40), noise(2000, 30)])


def test_a_coordinate_outside_of_the_vocabulary_is_refused(full_size: Side) -> None:
    steps = full_size.plan.image
    layouts = [prepare_image(noise(50, 40), steps).layout]
    messages = parse_messages([{"role": "user", "content": turn("<point>9999, 1</point>", 1)}])
    with pytest.raises(InputError, match=r"no token '5000'; if it is a coordinate"):
        full_size.encoder.encode(messages, layouts)


def test_a_picture_of_which_nothing_would_be_left_is_refused(full_size: Side) -> None:
    with pytest.raises(InputError, match="expected at least one pixel each way"):
        prepare_image(noise(5000, 1), full_size.plan.image)
    with pytest.raises(ValueError, match="Size must contain"):
        full_size.reference.image_inputs(noise(5000, 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 3},
        {"resample": 1, "padding_value": 200.0},
        {"do_normalize": False},
        {"do_rescale": False},
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]},
        {"patch_size": {"height": 8, "width": 8}, "size": {"height": 64, "width": 40}},
    ],
)
def test_settings_of_the_processor(tmp_path: Path, settings: dict[str, Any]) -> None:
    patch = settings.get("patch_size", {"height": 6})["height"]
    path = make_fuyu_checkpoint(tmp_path / "checkpoint", FuyuRecipe(patch=patch, layers=1))
    processor: Any = transformers.FuyuProcessor.from_pretrained(path)
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    (path / "processor_config.json").unlink()
    processor.image_processor.save_pretrained(path)
    side = Side(path)
    assert isinstance(side.plan.image, PatchImages)
    for size in ((7, 100), (30, 30), (100, 55)):
        side.check(turn("What is it?", 1), [noise(*size)])
