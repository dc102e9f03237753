from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.idefics2_checkpoints import AROUND, END, Idefics2Recipe, make_idefics2
from support.parity_rows import check_parity_row

from vlmport.api.builtin_cases import Case
from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.errors import CheckpointError, InputError, VlmportError
from vlmport.export.checkpoint import open_checkpoint
from vlmport.export.families.idefics2 import FAMILY
from vlmport.runtime import VisionLanguageModel

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def mixed_cases(scale: int = 1) -> tuple[Case, ...]:
    """No picture, one, and three of other shapes between the words."""
    one, wide = picture(61 * scale, 83 * scale), picture(100 * scale, 7, 1)
    return (
        Case("none", (text("How many shapes are there? Which colour?"),), ()),
        Case("one", (IMAGE, text("What is in the picture?")), (one,)),
        Case(
            "three",
            (text("Compare "), IMAGE, text(" with"), IMAGE, IMAGE, text("please.")),
            (wide, one, picture(9, 120 * scale, 2)),
        ),
    )


def check(row: str, recipe: Idefics2Recipe, folder: Path, cases: tuple[Case, ...]) -> None:
    checkpoint = make_idefics2(folder / "checkpoint", recipe)
    export(ExportOptions(checkpoint, folder / "bundle"), SilentProgress())
    check_parity_row("idefics2", row, checkpoint, folder / "bundle", cases)


def test_whole_pictures_in_a_chat(tmp_path: Path) -> None:
    check("whole, chat, 0/1/3 images", Idefics2Recipe(), tmp_path, mixed_cases())


def test_split_pictures_without_roles_beyond_a_sliding_window(tmp_path: Path) -> None:
    # 640 image tokens and more in pieces of 512, each token seeing 100 before it.
    recipe = Idefics2Recipe(
        splits=True, chat=False, latents=64, sliding_window=100, layers=1, depth=1, head_dim=16
    )
    check("split, base, window 100", recipe, tmp_path, mixed_cases())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bin", "single"])
def test_other_files_and_stored_types(layout: str, tmp_path: Path) -> None:
    recipe = Idefics2Recipe(
        layout=layout, dtype=torch.bfloat16, tied=True, sliding_window=None, resampler_kv_heads=4
    )
    check(f"tied, bf16, {layout}", recipe, tmp_path, mixed_cases())


@pytest.mark.slow
@pytest.mark.parametrize("splits", [False, True])
def test_released_image_sizes(splits: bool, tmp_path: Path) -> None:
    """All shapes as released, but few layers and short vectors."""
    recipe = Idefics2Recipe(
        splits=splits,
        shortest_edge=378,
        longest_edge=980,
        image_size=980,
        latents=64,
        depth=1,
        tower_layers=1,
        layers=1,
    )
    sizes = ((64, 980), (980, 64), (700, 980), (379, 391))
    cases = tuple(
        Case(f"{width}x{height}", (IMAGE, text("What is it?")), (picture(width, height),))
        for width, height in sizes
    )
    check(f"378 to 980 px, {'split' if splits else 'whole'}", recipe, tmp_path, cases)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idefics2")
    recipe = Idefics2Recipe(layers=1, depth=1, tower_layers=1)
    checkpoint = make_idefics2(folder / "checkpoint", recipe)
    export(ExportOptions(checkpoint, folder / "bundle"), SilentProgress())
    return folder / "bundle"


def test_the_bundle_says_what_the_checkpoint_says(bundle: Path) -> None:
    manifest = VisionLanguageModel.load(bundle).manifest
    assert manifest.image_graphs == ("vision_encoder", "projector")
    assert manifest.special_tokens.eos_token_ids == (2, END)
    assert manifest.generation.suppressed_token_ids == (AROUND, AROUND + 1)
    assert manifest.graph("vision_encoder").inputs[1].name == "patch_counts"


def test_forbidden_tokens_are_never_chosen(bundle: Path) -> None:
    model = VisionLanguageModel.load(bundle)
    seen: list[Any] = []
    model.generate(prompt="?", max_new_tokens=4, on_logits=lambda step: seen.append(step.copy()))
    lowest = np.finfo(np.float32).min
    assert all((step[0, [AROUND, AROUND + 1]] == lowest).all() for step in seen)


def test_features_of_a_picture_do_not_depend_on_its_padding(bundle: Path) -> None:
    model = VisionLanguageModel.load(bundle)
    alone = model.prepare(picture(40, 60))
    padded = dict(alone.inputs)
    pixels = np.full((1, 3, 98, 112), 7, np.float32)
    height, width = alone.inputs["pixel_values"].shape[2:]
    pixels[:, :, :height, :width] = alone.inputs["pixel_values"]
    padded["pixel_values"] = pixels
    encoded = model.run("vision_encoder", padded)
    features = model.run("projector", encoded)["image_features"]
    expected = model.image_features(alone)
    np.testing.assert_allclose(features.reshape(expected.shape), expected, atol=2e-5)


def test_text_that_contains_the_image_token_is_refused(bundle: Path) -> None:
    model = VisionLanguageModel.load(bundle)
    with pytest.raises(InputError, match="found 1 places for images"):
        model.generate(prompt="What is <image>?", max_new_tokens=1)


def change(name: str, **values: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("processor_config.json", image_seq_len=9), "image_seq_len 9; the resampler makes"),
        (
            change("preprocessor_config.json", size={"height": 56, "width": 56}),
            "expected shortest_edge and longest_edge",
        ),
        (
            change("preprocessor_config.json", size={"shortest_edge": 9, "longest_edge": 20}),
            "shortest_edge 9; expected a patch of 14",
        ),
        (change("preprocessor_config.json", do_pad=False), "do_resize or do_pad is off"),
        (
            change("preprocessor_config.json", image_processor_type="SiglipImageProcessor"),
            "image processor is a SiglipImageProcessorPil; expected Idefics2ImageProcessor",
        ),
        (change("config.json", image_token_id=77), "config.json has image_token_id 77"),
        (change("config.json", text_config={"model_type": "llama"}), "language model 'llama'"),
        (change("generation_config.json", bad_words_ids=[[3, 4]]), "single tokens alone"),
        (
            change(
                "config.json", perceiver_config={"resampler_n_latents": 6, "resampler_depth": 3}
            ),
            "do not fit",
        ),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    edit: Any, message: str, tmp_path: Path
) -> None:
    checkpoint = make_idefics2(tmp_path / "checkpoint", Idefics2Recipe(layers=1, depth=1))
    edit(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        FAMILY.plan(open_checkpoint(checkpoint))


def test_a_picture_too_small_to_split_is_refused(tmp_path: Path) -> None:
    from vlmport.runtime.preprocessing import prepare_image

    checkpoint = make_idefics2(tmp_path / "checkpoint", Idefics2Recipe(splits=True, layers=1))
    steps = FAMILY.plan(open_checkpoint(checkpoint)).image
    with pytest.raises(InputError, match="expected 2 x 2 or more"):
        prepare_image(picture(1, 30), steps)


def test_a_chat_without_a_template_takes_one_message(tmp_path: Path) -> None:
    from vlmport.runtime.messages import parse_messages
    from vlmport.runtime.prompt import PromptEncoder

    checkpoint = make_idefics2(tmp_path / "checkpoint", Idefics2Recipe(chat=False, layers=1))
    plan = FAMILY.plan(open_checkpoint(checkpoint))
    encoder = PromptEncoder(plan.tokenizer, plan.prompt, plan.special_tokens)
    chat = parse_messages([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    with pytest.raises(VlmportError, match="takes one message, of the user"):
        encoder.encode(chat, [])
