"""Fuyu bundles answer as transformers does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.fuyu_checkpoints import FuyuRecipe, make_fuyu_checkpoint
from support.parity_rows import check_parity_row

from vlmport.api.builtin_cases import Case, builtin_cases
from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.contract import CoordinateAnswers, PatchImages
from vlmport.errors import InputError
from vlmport.export.family import load_reference
from vlmport.runtime import Request, VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CONFIGURATIONS = {
    "hub keys": FuyuRecipe(),
    "hub keys, flat config": FuyuRecipe(
        is_flat=True, theta=10000.0, dtype=torch.bfloat16, layers=1
    ),
    "5.x keys, tied head, .bin": FuyuRecipe(
        layout="transformers", tied=True, file="bin", layers=1, heads=2
    ),
    "no q/k norm, rotary 0.25": FuyuRecipe(
        qk_layernorm=False, hidden_size=64, heads=2, rotary=0.25, layers=1, dtype=torch.float16
    ),
}


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 5000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def case(text: str, *sizes: tuple[int, int]) -> Case:
    content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": text}]
    name = " and ".join(f"{height}x{width}" for width, height in sizes) or "no image"
    return Case(name, tuple(content), tuple(noise(*size) for size in sizes))


def make_pair(folder: Path, recipe: FuyuRecipe) -> tuple[Path, Path]:
    """(checkpoint, bundle)."""
    checkpoint = make_fuyu_checkpoint(folder / "checkpoint", recipe)
    export(ExportOptions(checkpoint, folder / "bundle"), SilentProgress())
    return checkpoint, folder / "bundle"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), FuyuRecipe())


@pytest.fixture(scope="module")
def model(pair: tuple[Path, Path]) -> VisionLanguageModel:
    return VisionLanguageModel.load(pair[1])


def small_cases() -> tuple[Case, ...]:
    located = "from <box>10, 5, 40, 21</box> to <point>3, 90</point>"
    return (
        *builtin_cases(),
        case("", (1, 1)),
        case(located, (200, 50)),
        case("?", (7, 7), (95, 2)),
    )


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_bundle_answers_as_transformers(name: str, tmp_path: Path) -> None:
    check_parity_row("fuyu", name, *make_pair(tmp_path, CONFIGURATIONS[name]), small_cases())


def test_the_manifest_says_what_the_bundle_is(model: VisionLanguageModel) -> None:
    manifest = model.manifest
    assert [graph.name for graph in manifest.graphs] == ["projector", "embed_tokens", "decoder"]
    assert manifest.image_graphs == ("projector",)
    assert isinstance(manifest.image, PatchImages)
    assert manifest.prompt.image_tokens.kind == "rows"
    assert isinstance(manifest.answers, CoordinateAnswers)
    assert manifest.source.layout == "transformers-4"
    decoder = manifest.graph("decoder").operators
    # Two layers: rotation and attention are one node each, no rest of the split of q, k and v.
    assert (decoder["RotaryEmbedding"], decoder["Attention"]) == (4, 2)
    assert "Slice" not in decoder
    assert "Concat" not in decoder


def test_a_left_padded_batch_of_transformers_gives_the_same_tokens(
    pair: tuple[Path, Path], model: VisionLanguageModel
) -> None:
    reference: Any = load_reference(pair[0])
    texts = ["What is it?", "Generate a coco-style caption.\n", "?"]
    pictures = [noise(61, 33), noise(10, 100), noise(300, 5)]
    inputs = reference.processor(
        text=texts, images=pictures, return_tensors="pt", return_legacy_image_output=False
    )
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        expected = reference.model.generate(
            **inputs, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2
        )[:, -24:].tolist()
    requests = [
        Request(prompt=text, images=(picture,), max_new_tokens=24)
        for text, picture in zip(texts, pictures, strict=True)
    ]
    for answer, row in zip(model.generate_batch(requests), expected, strict=True):
        assert list(answer.token_ids) == row[: len(answer.token_ids)]


FULL = FuyuRecipe(
    patch=30, max_height=1080, max_width=1920, numbers=1000, max_length=16384, layers=1, heads=2
)
FULL_CASES = {
    "300x300": ((300, 300),),
    "30x1920": ((1920, 30),),
    "1080x1920": ((1920, 1080),),
    "2000x3000": ((3000, 2000),),
    "two images": ((1000, 200), (90, 700)),
}


@pytest.fixture(scope="module")
def full_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("full"), FULL)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_CASES)
def test_a_full_size_picture_alone_and_among_others(
    full_pair: tuple[Path, Path], name: str
) -> None:
    question = "What is in the picture?"
    cases = (case(question, *FULL_CASES[name]), case("Look <point>9, 9</point>", (61, 59)))
    check_parity_row("fuyu", f"patch 30, {name}", *full_pair, (*cases, case(question)))


@pytest.mark.slow
def test_a_prompt_of_eleven_thousand_tokens(full_pair: tuple[Path, Path]) -> None:
    cases = (case("Compare.", *[(1920, 1080)] * 4, (1800, 1050), (20, 20)), case("What?", (9, 9)))
    check_parity_row("fuyu", "patch 30, 6 images, 11k tokens", *full_pair, cases, 16)


class Script:
    """A tokenizer's ids for an answer written with the names of tokens."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model

    def regions(self, names: str, sizes: Sequence[tuple[int, int]]) -> Any:
        from vlmport.runtime.coordinate_regions import read_coordinates

        found = [self.model.tokenizer.token_to_id(name) for name in names.split()]
        ids = [token for token in found if token is not None]
        assert len(ids) == len(found)
        return read_coordinates(ids, self.model.tokenizer, self.model.manifest, sizes)


def test_answers_name_regions_in_pixels_of_the_picture(model: VisionLanguageModel) -> None:
    found = Script(model).regions("▁What <0x00> 3 4 20 30 <0x01> <0x02> 7 5 <0x03>", [(120, 96)])
    # 120 rows are shrunk to 60, so a coordinate is four pixels.
    box, point = (region.box for region in found.regions)
    assert (box.y_min, box.x_min, box.y_max, box.x_max) == (12, 16, 80, 120)
    assert (point.y_min, point.x_min, point.y_max, point.x_max) == (20, 28, 20, 28)
    assert found.faults == ()


def test_a_malformed_region_is_told_and_not_guessed(model: VisionLanguageModel) -> None:
    found = Script(model).regions("<0x00> 3 4 20 <0x01> ▁What", [(60, 96)])
    assert found.regions == ()
    assert "expected 4 coordinates" in found.faults[0]
    found = Script(model).regions("<0x00> 3 4 20 30 <0x01>", [(60, 96), (9, 9)])
    assert found.regions == ()
    assert "expected one picture" in found.faults[0]


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a |SPEAKER| token", "found 1 places for images"),
        ("<box>1, 2, 3</box>", "found a location"),
    ],
)
def test_bad_prompts(model: VisionLanguageModel, prompt: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        model.generate(
            prompt=prompt, images=[noise(9, 9)] if "box" in prompt else [], max_new_tokens=1
        )


def test_text_with_the_image_token_is_refused(model: VisionLanguageModel) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "|SPEAKER|"}]
    from vlmport.runtime.messages import parse_messages

    with pytest.raises(InputError, match="stands for an image"):
        model.generate(
            messages=parse_messages([{"role": "user", "content": content}]), images=[noise(9, 9)]
        )


def test_a_chat_of_several_turns_is_refused(model: VisionLanguageModel) -> None:
    from vlmport.runtime.messages import parse_messages

    turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")]
    with pytest.raises(InputError, match="takes one message, of role user"):
        model.generate(messages=parse_messages(turns))


def test_pictures_that_take_more_tokens_than_there_are_are_refused(
    model: VisionLanguageModel,
) -> None:
    with pytest.raises(InputError, match=r"found 12\d\d tokens \(1120 of images\)"):
        model.generate(prompt="?", images=[noise(96, 60)] * 7)


def test_inspect_says_that_there_is_no_vision_encoder(
    pair: tuple[Path, Path], run_cli: Any
) -> None:
    code, output, _ = run_cli("inspect", str(pair[1]))
    assert code == 0
    assert "projector (no vision_encoder graph)" in output
    assert "shrink to fit 60x96" in output
    code, output, _ = run_cli("inspect", str(pair[1]), "--json")
    graphs = json.loads(output)["manifest"]["graphs"]
    assert [graph["name"] for graph in graphs] == ["projector", "embed_tokens", "decoder"]


def test_the_command_line_generates_and_compares(
    pair: tuple[Path, Path], tmp_path: Path, run_cli: Any
) -> None:
    picture = tmp_path / "picture.png"
    noise(50, 20).save(picture)
    arguments = ("--image", str(picture), "--prompt", "What is it?", "--max-new-tokens", "4")
    code, output, _ = run_cli("generate", str(pair[1]), *arguments, "--json")
    assert code == 0
    answer = json.loads(output)
    assert (answer["generated_tokens"], answer["image_tokens"]) == (4, 36)
    code, output, _ = run_cli("parity", str(pair[0]), str(pair[1]), *arguments)
    assert code == 0
    assert "PASS" in output
