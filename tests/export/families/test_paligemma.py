"""PaliGemma bundles beside transformers: answers, processor, regions and the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.mask_weights import save_mask_weights
from support.paligemma_checkpoints import PaliGemmaRecipe, location_id, make_paligemma
from support.parity_rows import check_parity_row
from support.photographs import PHOTOGRAPHS, photograph
from transformers.image_utils import load_image as transformers_load_image

from vlmport.api.builtin_cases import Case
from vlmport.api.export import ExportOptions, export
from vlmport.api.parity import ParityOptions, parity
from vlmport.api.progress import SilentProgress
from vlmport.errors import InputError
from vlmport.runtime import Box, Request, VisionLanguageModel
from vlmport.runtime.messages import messages_from_prompt, parse_messages
from vlmport.runtime.sampling import TokenSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


RunCli = Any  # the fixture of conftest
LONG = "What is in the picture? Describe it closely, and name every shape that you can see. " * 2
FIRST = PaliGemmaRecipe("gemma", 224, tower_layers=1, heads=8, kv_heads=1, head_dim=256)
SECOND = PaliGemmaRecipe("gemma2", 224, tower_layers=1, heads=4, kv_heads=2, sliding_window=8)


def image_part() -> dict[str, str]:
    return {"type": "image"}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def mixed_cases(*, pairs: bool = True) -> tuple[Case, ...]:
    """One picture, more than one, and one in the middle of the text; prompts of unlike lengths."""
    china, rocket = photograph("china.jpg"), photograph("rocket.jpg")
    second = (image_part(), image_part()) if pairs else (image_part(),)
    pictures = (rocket, photograph("coins.png")) if pairs else (rocket,)
    return (
        Case("one picture", (image_part(), text_part("detect cat")), (china,)),
        Case("two pictures" if pairs else "long", (*second, text_part(LONG)), pictures),
        Case("inside", (text_part("caption "), image_part(), text_part("en")), (china,)),
    )


def exported(folder: Path, recipe: PaliGemmaRecipe, **options: Any) -> tuple[Path, Path]:
    checkpoint = make_paligemma(folder / "checkpoint", recipe)
    export(ExportOptions(checkpoint, folder / "bundle", **options), SilentProgress())
    return checkpoint, folder / "bundle"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("first")
    weights = save_mask_weights(folder / "vae-oid.npz")
    return exported(folder, FIRST, mask_decoder=weights)


@pytest.fixture(scope="module")
def model(first: tuple[Path, Path]) -> VisionLanguageModel:
    return VisionLanguageModel.load(first[1])


@pytest.fixture(scope="module")
def reference_model(first: tuple[Path, Path]) -> Any:
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        first[0], dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def processor(first: tuple[Path, Path]) -> Any:
    return transformers.AutoProcessor.from_pretrained(first[0])


def test_answers_equal_transformers(first: tuple[Path, Path]) -> None:
    check_parity_row("paligemma", "PaliGemma 224", *first, mixed_cases())


def test_answers_of_the_second_version_equal_transformers(tmp_path: Path) -> None:
    paths = exported(tmp_path, SECOND)
    check_parity_row("paligemma", "PaliGemma 2 224, window 8", *paths, mixed_cases())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        ("PaliGemma 448", PaliGemmaRecipe("gemma", 448, heads=8, dtype=torch.bfloat16)),
        ("PaliGemma 896", PaliGemmaRecipe("gemma", 896, heads=2, layers=1, layout="saved")),
        ("PaliGemma, untied, biased", PaliGemmaRecipe(tied=False, attention_bias=True)),
        (
            "PaliGemma 2 224, window 300",  # between the shortest prompt and its answer's end
            PaliGemmaRecipe("gemma2", 224, kv_heads=4, sliding_window=300, head_dim=256),
        ),
        ("PaliGemma 2 448", PaliGemmaRecipe("gemma2", 448, heads=8, kv_heads=4, layout="bin")),
        ("PaliGemma 2 896", PaliGemmaRecipe("gemma2", 896, heads=2, kv_heads=2, layout="nested")),
        (
            "PaliGemma 2, no soft caps",
            PaliGemmaRecipe("gemma2", attn_softcap=None, final_softcap=None, sliding_window=20),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_of_every_variant_equal_transformers(
    row: str, recipe: PaliGemmaRecipe, tmp_path: Path
) -> None:
    paths = exported(tmp_path, recipe)
    # Two pictures of 4096 tokens leave no room in the 8192 positions of Gemma.
    cases = mixed_cases(pairs=recipe.image_size < 896)
    check_parity_row("paligemma", row, *paths, cases)


# Prompt, and names of photographs; <image> says where they stand.
PROMPTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *(
        (f"detect {name.split('.')[0]}", (name,))
        for names in PHOTOGRAPHS.values()
        for name in names
    ),
    *(("caption en", (name,)) for names in PHOTOGRAPHS.values() for name in names),
    ("", ("china.jpg",)),
    ("\n", ("flower.jpg",)),
    ("  two  spaces  ", ("flower.jpg",)),
    ("ends with a newline\n", ("flower.jpg",)),
    ("naïve 東京 🐈 café\t\r\n", ("logo.png",)),
    ("detect <loc0000><loc0512><loc1023> ; <seg000><seg127>", ("chelsea.png",)),
    ("<bos>twice<eos><unk><pad>", ("chelsea.png",)),
    ("before<image>after", ("coffee.png",)),
    ("<image>", ("coffee.png",)),
    ("ends with one <image>", ("coffee.png",)),
    ("compare", ("rocket.jpg", "astronaut.png")),
    ("<image><image>compare", ("rocket.jpg", "astronaut.png")),
    ("first <image> and second <image> compare", ("camera.png", "text.png")),
    (LONG, ("page.png", "coins.png", "china.jpg")),
    ("\x00\x1b\u200b", ("retina.jpg",)),
    ("segment the red circle ; the dog", ("retina.jpg",)),
)


@pytest.mark.parametrize(("prompt", "names"), PROMPTS, ids=lambda value: repr(value)[:40])
def test_prompt_and_pixels_are_those_of_the_processor(
    prompt: str,
    names: tuple[str, ...],
    model: VisionLanguageModel,
    processor: Any,
    reference_model: Any,
) -> None:
    paths = [photograph(name) for name in names]
    prepared = [model.prepare(path) for path in paths]
    own = model.encode(
        messages_from_prompt(prompt, len(paths), "<image>"), [image.layout for image in prepared]
    )
    text = prompt if "<image>" in prompt else "<image>" * len(paths) + prompt
    pictures = [transformers_load_image(str(path)) for path in paths]
    inputs = processor(text=[text], images=[pictures], return_tensors="pt")
    pixels = np.concatenate([image.inputs["pixel_values"] for image in prepared])
    np.testing.assert_array_equal(pixels, inputs["pixel_values"].numpy())
    np.testing.assert_array_equal(own.input_ids, inputs["input_ids"][0].numpy())
    # The whole prompt is valid, and all of it is the bidirectional prefix.
    assert inputs["attention_mask"].bool().all()
    assert (inputs["token_type_ids"] == 0).all()
    seen = language_model_inputs(reference_model, inputs)
    fed = decoder_inputs(model, [Request(prompt=prompt, images=tuple(paths), max_new_tokens=1)])
    np.testing.assert_array_equal(fed["position_ids"], seen["position_ids"].numpy())
    assert seen["attention_mask"].all()
    assert fed["valid_lengths"].tolist() == [seen["attention_mask"].shape[-1]]


def language_model_inputs(reference_model: Any, inputs: Any) -> dict[str, Any]:
    """What transformers' model gives its language model in the first step of `generate`."""
    seen: list[dict[str, Any]] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    names = ("input_ids", "attention_mask", "pixel_values", "token_type_ids")
    hook = reference_model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    reference_model.generate(**{name: inputs[name] for name in names}, max_new_tokens=1)
    hook.remove()
    return seen[0]


def decoder_inputs(model: VisionLanguageModel, requests: Sequence[Request]) -> dict[str, Any]:
    """What the runtime gives the decoder graph in its first step."""
    fed: list[tuple[NDArray[Any], ...]] = []
    from vlmport.runtime.backends.onnxruntime import OnnxRuntimeDecoding

    run = OnnxRuntimeDecoding._run

    def keep(self: Any, *arrays: NDArray[Any]) -> None:
        fed.append(tuple(array.copy() for array in arrays))
        run(self, *arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeDecoding, "_run", keep)
        model.generate_batch(requests)
    assert len(fed) == 1  # the prompt runs in one piece, whatever its length
    names = ("inputs_embeds", "position_ids", "write_indices", "valid_lengths")
    return dict(zip(names, fed[0], strict=True))


def test_rows_of_a_batch_see_their_own_prompt_alone(
    model: VisionLanguageModel, processor: Any, reference_model: Any
) -> None:
    prompts, picture = ["detect cat", LONG, "caption en"], photograph("china.jpg")
    pictures = [[transformers_load_image(str(picture))]] * 3
    text = [f"<image>{prompt}" for prompt in prompts]
    inputs = processor(text=text, images=pictures, return_tensors="pt", padding=True)
    mask = language_model_inputs(reference_model, inputs)["attention_mask"].numpy()
    requests = [Request(prompt=p, images=(picture,), max_new_tokens=1) for p in prompts]
    lengths = decoder_inputs(model, requests)["valid_lengths"]
    for row, length in enumerate(lengths):
        # transformers pads on the left, the runtime on the right.
        assert mask[row, 0, -length:, -length:].all()
        assert not mask[row, 0, -length:, :-length].any()


def test_parity_skips_the_text_only_cases_and_says_so(first: tuple[Path, Path]) -> None:
    report = parity(ParityOptions(*first, max_new_tokens=2), SilentProgress())
    assert report.verdict == "PASS"
    assert [line.split(":")[0] for line in report.skipped] == [
        "case 'text only, short'",
        "case 'text only, long'",
    ]
    assert all("found no image, expected one or more" in line for line in report.skipped)


def test_prompt_without_a_picture_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="answers about pictures alone: found no image, expected"):
        model.generate(prompt="caption en")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "caption"}],
        [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "caption"},
        ],
        [{"role": "assistant", "content": [{"type": "image"}]}],
    ],
)
def test_other_turns_than_one_of_the_user_are_refused(
    messages: list[dict[str, Any]], model: VisionLanguageModel
) -> None:
    images = sum(m["content"] == [{"type": "image"}] for m in messages)
    with pytest.raises(InputError, match="takes one message, of the user; it knows no system"):
        model.generate(
            messages=parse_messages(messages), images=[Image.new("RGB", (9, 9))] * images
        )


def test_text_that_contains_the_image_token_is_refused(model: VisionLanguageModel) -> None:
    picture = Image.new("RGB", (9, 9))
    with pytest.raises(InputError, match="found 2 places for images"):
        model.generate(prompt="<image> or <image>", images=[picture])
    content = [{"type": "image"}, {"type": "text", "text": "an <image> token"}]
    with pytest.raises(InputError, match="contains '<image>', which stands for an image"):
        model.generate(
            messages=parse_messages([{"role": "user", "content": content}]), images=[picture]
        )


@pytest.fixture
def scripted(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every model answer as told, since a random one detects nothing."""

    def script(answer: str) -> None:
        ids = [*model.tokenizer.encode(answer, add_special_tokens=False).ids, 1]
        rest = iter(ids)
        monkeypatch.setattr(TokenSampler, "select", lambda _self, _logits: next(rest))

    return script


SEGMENTED = "<loc0100><loc0200><loc0600><loc0700>" + "".join(
    f"<seg{code:03}>" for code in range(16)
)


def test_answer_carries_regions_in_pixels_of_the_original(
    model: VisionLanguageModel, scripted: Callable[[str], None]
) -> None:
    scripted(f"{SEGMENTED} cat ; <loc0001><loc0002><loc0003> dog")
    result = model.generate(prompt="segment cat ; dog", images=[photograph("rocket.jpg")])
    assert result.finish_reason == "stop"
    assert result.token_ids[0] == location_id(100)
    [region] = result.regions
    height, width = 427, 640
    box = (100 * height / 1024, 200 * width / 1024, 600 * height / 1024, 700 * width / 1024)
    assert region.box == Box(*box)
    assert (region.label, region.codes) == ("cat", tuple(range(16)))
    assert region.mask is not None
    assert region.mask.shape == (height, width)
    rows, columns = np.nonzero(region.mask)
    assert round(box[0]) <= rows.min() < rows.max() < round(box[2])
    assert round(box[1]) <= columns.min() < columns.max() < round(box[3])
    assert result.faults == (
        (
            "answer, region 2 ('dog'): found 3 location tokens and 0 segment tokens; expected 4 "
            "location tokens, then no or 16 segment tokens"
        ),
    )


def test_command_line_carries_and_draws_regions(
    first: tuple[Path, Path], scripted: Callable[[str], None], run_cli: RunCli, tmp_path: Path
) -> None:
    picture, target = photograph("china.jpg"), tmp_path / "drawn.png"
    arguments = ("generate", first[1], "--image", picture, "--prompt", "segment cat")
    scripted(f"{SEGMENTED} cat ; <loc0001> dog")
    code, out, err = run_cli(*arguments, "--json", "--draw", target)
    assert code == 0
    answer = json.loads(out)
    [region] = answer["regions"]
    assert region["label"] == "cat"
    assert region["codes"] == list(range(16))
    assert set(region["box"]) == {"y_min", "x_min", "y_max", "x_max"}
    assert region["mask"]["size"] == [427, 640]
    assert sum(region["mask"]["counts"]) == 427 * 640
    assert len(answer["faults"]) == 1
    assert err == f"warning: {answer['faults'][0]}\n"
    drawn, original = np.asarray(Image.open(target)), np.asarray(Image.open(picture))
    assert drawn.shape == original.shape
    changed = (drawn != original).any(axis=2)
    mask = np.repeat(np.arange(len(region["mask"]["counts"])) % 2 == 1, region["mask"]["counts"])
    inside = mask.reshape((427, 640), order="F")
    assert changed[inside].mean() > 0.9
    assert not changed[:20].any()


@pytest.mark.parametrize(
    ("draw", "images", "message"),
    [
        ("a.xyz", ("china.jpg",), r"a\.xyz: Pillow writes no \.xyz; try \.png"),
        ("a", ("china.jpg",), r"a: Pillow writes no file without ending"),
        ("nowhere/a.png", ("china.jpg",), "there is no folder"),
        ("a.png", ("china.jpg", "rocket.jpg"), "found 2 pictures; expected one to draw on"),
    ],
)
def test_drawing_that_cannot_be_made_is_told_before_the_model_runs(
    draw: str,
    images: tuple[str, ...],
    message: str,
    first: tuple[Path, Path],
    run_cli: RunCli,
    tmp_path: Path,
) -> None:
    options = [word for name in images for word in ("--image", photograph(name))]
    arguments = ("generate", first[1], *options, "--prompt", "detect cat")
    code, out, err = run_cli(*arguments, "--draw", tmp_path / draw)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    import re

    assert re.search(message, err)


def test_inspect_tells_what_answers_are_made_of(first: tuple[Path, Path], run_cli: RunCli) -> None:
    code, out, _ = run_cli("inspect", first[1])
    assert code == 0
    assert "regions by location tokens, masks by the graph mask_decoder" in " ".join(out.split())
    manifest = json.loads(run_cli("inspect", first[1], "--json")[1])["manifest"]
    assert manifest["answers"]["kind"] == "location_tokens"
    assert manifest["attention"] == {"prompt": "bidirectional", "first_position": 1}
