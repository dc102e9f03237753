"""Pixels, patch counts and token ids equal those of transformers' Idefics2Processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.idefics2_checkpoints import IMAGE, Idefics2Recipe, make_idefics2
from support.photographs import PHOTOGRAPHS, photograph

from vlmport.export.checkpoint import open_checkpoint
from vlmport.export.families.idefics2 import FAMILY
from vlmport.export.family import ExportPlan
from vlmport.runtime.image_file import load_image
from vlmport.runtime.messages import parse_messages
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.prompt import PromptEncoder

NAMES = [name for names in PHOTOGRAPHS.values() for name in names]
SIZES = ((64, 980), (980, 64), (980, 980), (981, 379), (377, 2000), (13, 13), (2, 3), (1400, 1399))
PICTURE, AROUND = {"type": "image"}, "<fake_token_around_image>"


def words(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": [words("What?")]}],
    [{"role": "user", "content": [PICTURE, words("What?")]}],
    [{"role": "user", "content": [PICTURE, words(" What?")]}],
    [{"role": "user", "content": [words("Look: "), PICTURE]}],
    [
        {
            "role": "user",
            "content": [words("a"), PICTURE, PICTURE, words("b"), PICTURE, words("\nc")],
        }
    ],
    [{"role": "user", "content": [PICTURE, words("<b>")]}],
    [{"role": "user", "content": [PICTURE, words(f"{AROUND}x {AROUND}{AROUND}")]}],
    [
        {"role": "user", "content": [PICTURE, words("One?")]},
        {"role": "assistant", "content": [words("A red circle.")]},
        {"role": "user", "content": [PICTURE, words("Ünd 東?")]},
    ],
)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, ExportPlan]:
    """Plans with the released image sizes, whole and split."""
    folder = tmp_path_factory.mktemp("processors")
    released = Idefics2Recipe(shortest_edge=378, longest_edge=980, image_size=980, layers=1)
    found = {}
    for splits in (False, True):
        recipe = replace(released, splits=splits)
        checkpoint = make_idefics2(folder / str(splits), recipe)
        found[splits] = FAMILY.plan(open_checkpoint(checkpoint))
    return found


@pytest.fixture(scope="module")
def references(plans: dict[bool, ExportPlan]) -> dict[bool, Any]:
    return {splits: plan.reference() for splits, plan in plans.items()}


def check_pixels(plan: ExportPlan, reference: Any, image: Path | Image.Image) -> None:
    loaded = load_image(image)
    found, expected = prepare_image(loaded, plan.image), reference.image_inputs(loaded)
    assert found.inputs.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found.inputs[name], array)
        assert found.inputs[name].dtype == array.dtype


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_photographs(
    name: str, splits: bool, plans: dict[bool, ExportPlan], references: dict[bool, Any]
) -> None:
    check_pixels(plans[splits], references[splits], photograph(name))


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_awkward_sizes(
    size: tuple[int, int],
    splits: bool,
    plans: dict[bool, ExportPlan],
    references: dict[bool, Any],
) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
    check_pixels(plans[splits], references[splits], Image.fromarray(pixels))


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_prompts(
    chat: list[dict[str, Any]],
    splits: bool,
    plans: dict[bool, ExportPlan],
    references: dict[bool, Any],
) -> None:
    plan, reference = plans[splits], references[splits]
    count = sum(part["type"] == "image" for turn in chat for part in turn["content"])
    image = Image.new("RGB", (40, 30), (9, 99, 199))
    layout = prepare_image(image, plan.image).layout
    encoder = PromptEncoder(plan.tokenizer, plan.prompt, plan.special_tokens)
    found = encoder.encode(parse_messages(chat), [layout] * count)
    processor = reference.processor
    text = processor.tokenizer.apply_chat_template(
        chat, chat_template=reference.template, tokenize=False, add_generation_prompt=True
    )
    expected = processor(text=[text], images=[[image] * count] if count else None)
    np.testing.assert_array_equal(found.input_ids, expected["input_ids"][0])
    np.testing.assert_array_equal(found.image_mask, found.input_ids == IMAGE)
    # Positions and mask of a prompt alone: nothing is padded.
    assert set(expected["attention_mask"][0]) == {1}
