"""The trained checkpoints as transformers' own model and processor classes read them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from tiny.evaluation import accuracy, answer, with_wrong_pictures
from tiny.family import TinyFamily
from tiny.pictures import normalized
from tiny.recipes import EXAMPLES, RECIPES
from torch import Tensor
from transformers import (
    AutoProcessor,
    FuyuForCausalLM,
    Idefics2ForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
)
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

HELDOUT_SEED = 3  # scripts/train_tiny.py's
CLASSES: dict[str, Any] = {  # transformers leaves from_pretrained untyped
    "fuyu": FuyuForCausalLM,
    "idefics2": Idefics2ForConditionalGeneration,
    "paligemma": PaliGemmaForConditionalGeneration,
}
EVERY = pytest.mark.parametrize("name", sorted(CLASSES))


@dataclass(frozen=True)
class Shown:
    images: tuple[Image.Image, ...]
    text: str
    answer: str


@functools.cache
def family_of(name: str) -> TinyFamily:
    return RECIPES[name].load(EXAMPLES / name)


def shown(name: str, count: int) -> list[Shown]:
    """Reads the sample drawings that lie beside the checkpoint."""
    folder = EXAMPLES / RECIPES[name].questions_folder
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines][:count]
    return [
        Shown(
            tuple(Image.open(folder / file) for file in entry.get("images", [entry.get("image")])),
            entry["text"],
            entry["answer"],
        )
        for entry in entries
    ]


def processed(name: str, sample: Shown) -> dict[str, Tensor]:
    """Lets the family's processor make a prompt, as its documentation says."""
    processor = AutoProcessor.from_pretrained(EXAMPLES / name)
    images, text = list(sample.images), sample.text
    options: dict[str, Any] = {"return_tensors": "pt"}
    if name == "idefics2":
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    elif name == "paligemma":
        text = f"<image>{text}"
    else:
        options["return_legacy_image_output"] = False
    inputs = dict(processor(images=images, text=text, **options))
    inputs.pop("labels", None)  # PaliGemma's, for training
    return inputs


@pytest.fixture(autouse=True)
def patchify_takes_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mends transformers 5.23, where Fuyu's PIL image processor patchifies arrays only."""
    patchify = FuyuImageProcessorPil.patchify_image

    def patchify_tensor(self: FuyuImageProcessorPil, image: Tensor, patch_size: Any) -> Tensor:
        patches = patchify(self, image=image.numpy(), patch_size=patch_size)
        return torch.from_numpy(patches)

    monkeypatch.setattr(FuyuImageProcessorPil, "patchify_image", patchify_tensor)


@EVERY
def test_checkpoint_is_small_and_whole(name: str) -> None:
    files = {path.name: path.stat().st_size for path in (EXAMPLES / name).iterdir()}
    assert sum(files.values()) <= 6_000_000
    assert files.keys() >= {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors",
        "preprocessor_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


@EVERY
def test_transformers_finds_every_weight(name: str) -> None:
    _, report = CLASSES[name].from_pretrained(EXAMPLES / name, output_loading_info=True)
    assert {kind: list(names) for kind, names in report.items() if names} == {}


@EVERY
def test_training_saw_what_the_processor_makes(name: str) -> None:
    family = family_of(name)
    for sample in shown(name, 12):
        inputs = processed(name, sample)
        pixels = tuple(family.resize(image) for image in sample.images)
        turn = family.turn(sample.text, sample.answer, is_first=True)
        prompt = family.prefix(pixels) + turn.ids[: turn.answer_start]
        assert inputs["input_ids"].tolist() == [prompt]
        assert torch.equal(inputs["pixel_values"], seen(name, pixels))


def seen(name: str, pixels: Sequence[Tensor]) -> Tensor:
    if name == "paligemma":
        return normalized(pixels)
    if name == "idefics2":
        height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
        stacked = torch.zeros((1, len(pixels), 3, height, width))
        for number, image in enumerate(pixels):
            rows, columns = image.shape[1:]
            stacked[0, number, :, :rows, :columns] = normalized([image])[0]
        return stacked
    image = normalized(pixels)[0].permute(1, 2, 0)
    height, width = image.shape[:2]
    corners = [(top, left) for top in range(0, height, 30) for left in range(0, width, 30)]
    return torch.stack(
        [image[top : top + 30, left : left + 30].reshape(-1) for top, left in corners]
    )


@EVERY
def test_transformers_answers_as_training_measured(name: str) -> None:
    family = family_of(name)
    model = CLASSES[name].from_pretrained(EXAMPLES / name, dtype=torch.float32)
    samples = RECIPES[name].lessons().heldout(24, HELDOUT_SEED)
    right = 0
    for sample, expected in zip(shown(name, 24), answer(family, samples), strict=True):
        inputs = processed(name, sample)
        with torch.no_grad():
            generated = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        ids = generated[0, inputs["input_ids"].shape[1] :].tolist()
        assert family.decode_text(ids) == expected
        right += expected == sample.answer
    assert right >= 20


@EVERY
def test_nine_of_ten_held_out_questions_are_answered_exactly(name: str) -> None:
    samples = RECIPES[name].lessons().heldout(240, HELDOUT_SEED)
    shares = accuracy(samples, answer(family_of(name), samples))
    assert shares["overall"] >= 0.9, shares


@EVERY
def test_answers_come_from_the_picture(name: str) -> None:
    samples = with_wrong_pictures(RECIPES[name].lessons().heldout(120, HELDOUT_SEED))
    shares = accuracy(samples, answer(family_of(name), samples))
    assert shares["overall"] < 0.6, shares
