"""Pixels, token ids, masks and positions are those of transformers' processors and of Factory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import skimage
import sklearn.datasets
import transformers
from PIL import Image
from support.checkpoints import Recipe, make_checkpoint

from vlmport.export.family import plan_checkpoint
from vlmport.export.processor_files import load_image_processor
from vlmport.runtime import Request, VisionLanguageModel
from vlmport.runtime.backends.onnxruntime import OnnxRuntimeDecoding
from vlmport.runtime.image_file import load_image
from vlmport.runtime.messages import ImagePart, Message, TextPart
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.prompt import PromptEncoder

if TYPE_CHECKING:
    from vlmport.export.family import ExportPlan

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")
PHOTOS = [
    *(Path(sklearn.datasets.__file__).parent / "images" / n for n in ("china.jpg", "flower.jpg")),
    *(Path(skimage.__file__).parent / "data" / name for name in (*_SKIMAGE, "camera.png")),
    *(Path(skimage.__file__).parent / "data" / name for name in ("logo.png", "retina.jpg")),
]
QUESTIONS = (
    "What is this?",
    "  Which colours do you see,\nand where?  ",
    "Zähle die Blumen: 1, 2, 3 … 東京 ☕",
    "<s> is no picture, and neither is < image >.",
    "Is the first picture brighter than the second one?",
)
TRANSFORMERS = (
    Recipe("llama", "clip", "mlp2x_gelu", "square", "patch", "transformers"),
    Recipe("llama", "siglip", "mlp2x_gelu", "square", "cls_patch", "transformers"),
)
FACTORY = (
    Recipe("llama", "clip", "linear", "pad", "patch"),
    Recipe("phi", "siglip", "linear", "square", "patch"),
    Recipe("qwen2", "dinov2", "linear", "square", "cls_patch"),
    Recipe("llama", "mof", "mof_mlp", "pad", "cls_patch"),
)
ENDS = {"llama": "</s>", "phi": "<|endoftext|>", "qwen2": "<|endoftext|>"}


@pytest.fixture(scope="module", params=(*TRANSFORMERS, *FACTORY), ids=lambda recipe: recipe.name)
def planned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path, ExportPlan]:
    recipe: Recipe = request.param
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("processor") / "checkpoint", recipe)
    return recipe, checkpoint, plan_checkpoint(checkpoint)[1]


@pytest.mark.parametrize("index", range(len(PHOTOS)), ids=lambda index: PHOTOS[index].name)
def test_photographs_and_prompts_are_prepared_as_by_transformers(
    index: int, planned: tuple[Recipe, Path, ExportPlan]
) -> None:
    recipe, checkpoint, plan = planned
    question = QUESTIONS[index % len(QUESTIONS)]
    paths = [PHOTOS[index], PHOTOS[(index + 3) % len(PHOTOS)]][: 1 + index % 2]
    images = [prepare_image(load_image(path), plan.image) for path in paths]
    rgb = [Image.open(path).convert("RGB") for path in paths]
    places: list[ImagePart | TextPart] = [ImagePart() for _ in paths]
    content = (*places, TextPart(question))
    encoder = PromptEncoder(plan.tokenizer, plan.prompt, plan.special_tokens)
    found = encoder.encode((Message("user", content),), [image.layout for image in images])
    if recipe.layout == "transformers":
        pixels, ids, mask = transformers_inputs(recipe, checkpoint, plan, rgb, question)
    else:
        pixels, ids, mask = factory_inputs(recipe, checkpoint, plan, rgb, question)
    ours = np.concatenate([image.inputs["pixel_values"] for image in images])
    np.testing.assert_array_equal(ours, pixels)
    np.testing.assert_array_equal(found.image_mask, mask)
    np.testing.assert_array_equal(found.text_ids, ids[~mask])


def transformers_inputs(
    recipe: Recipe, checkpoint: Path, plan: ExportPlan, images: list[Image.Image], question: str
) -> tuple[Any, Any, Any]:
    """(pixel_values, input_ids, where image tokens are) of LlavaProcessor."""
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    image_processor: Any = load_image_processor(checkpoint, "", 0)
    strategy: Any = "default" if recipe.select == "patch" else "full"
    processor: Any = transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
        num_additional_image_tokens=int(recipe.tower == "clip"),
    )
    lines = "<image>\n" * len(images)
    text = f"USER: {lines}{question}\nASSISTANT:"
    inputs = processor(text=text, images=images, return_tensors="np")
    assert inputs["attention_mask"].all()
    ids = inputs["input_ids"][0]
    return inputs["pixel_values"], ids, ids == plan.special_tokens.image_token_id


def factory_inputs(
    recipe: Recipe, checkpoint: Path, plan: ExportPlan, images: list[Image.Image], question: str
) -> tuple[Any, Any, Any]:
    """The same as Factory makes them: template/base.py and image_preprocess.py."""
    tower = "clip_vision_model" if recipe.tower in ("clip", "mof") else "siglip_vision_model"
    processor: Any = load_image_processor(checkpoint, tower, 56)
    if recipe.aspect == "pad":
        colour = tuple(int(value * 255) for value in processor.image_mean)
        images = [squared(image, colour) for image in images]
    pixels = np.concatenate([processor(i, return_tensors="np")["pixel_values"] for i in images])
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    asked = ("<image>\n" * len(images) + question.strip()).strip()
    chunks = [tokenizer(c).input_ids for c in f"{SYSTEM}USER: {asked} ASSISTANT:".split("<image>")]
    ids = [*chunks[0]]
    for chunk in chunks[1:]:
        ids += [-200] * plan.prompt.image_tokens.count + chunk[1:]
    merged = np.array(ids, np.int64)
    return pixels, merged, merged == -200


def squared(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def test_masks_and_positions_of_a_mixed_batch(
    trained_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = VisionLanguageModel.load(trained_bundle, verify=False)
    fed: list[dict[str, Any]] = []
    run = OnnxRuntimeDecoding._run

    def spy(self: Any, embeds: Any, positions: Any, writes: Any, lengths: Any) -> None:
        fed.append({"positions": positions.copy(), "writes": writes.copy(), "lengths": lengths})
        run(self, embeds, positions, writes, lengths)

    monkeypatch.setattr(OnnxRuntimeDecoding, "_run", spy)
    requests = [
        Request(prompt=QUESTIONS[0], images=tuple(PHOTOS[:count]), max_new_tokens=1)
        for count in range(3)
    ]
    results = model.generate_batch(requests)
    lengths = [result.prompt_tokens for result in results]
    longest = max(lengths)
    # Right padding, as transformers has it with position_ids = cumsum(attention_mask) - 1.
    attention = np.arange(longest)[None] < np.array(lengths)[:, None]
    expected = np.cumsum(attention, axis=1) - 1
    found = np.concatenate([call["positions"] for call in fed], axis=1)
    np.testing.assert_array_equal(found[attention], expected[attention])
    np.testing.assert_array_equal(fed[-1]["lengths"].max(), longest)
    assert all((call["writes"] == call["positions"][:, 0]).all() for call in fed)
