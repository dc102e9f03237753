"""Greedy tokens and logits of bundles equal transformers, for every part and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import Recipe, make_checkpoint

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.export.family import load_reference
from vlmport.runtime import Request, VisionLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# fp32 logits against transformers, absolute; measured 2e-6 to 7e-6 on these models.
LOGITS_TOLERANCE = 1e-4
NEW_TOKENS = 64
QUESTIONS = (
    "How many shapes are there? Which colour? And why do you think so?",
    "What is in the picture?",
    "Compare them.",
)
FAST = (
    Recipe("llama", "siglip", "mlp2x_gelu", "square", "patch", "merged"),
    Recipe("llama", "clip", "linear", "pad", "cls_patch", "merged", tied=True),
    Recipe("phi", "siglip", "mlp3x_gelu", "pad", "patch", "merged", dtype=torch.float16),
    Recipe("stablelm", "clip", "resampler", "square", "patch", "merged", dtype=torch.bfloat16),
    Recipe("stablelm", "siglip", "mlp2x_gelu", "pad", "cls_patch", "separate"),
    Recipe("llama", "clip", "resampler", "square", "cls_patch", "separate", tied=True),
    Recipe("phi", "siglip", "linear", "square", "cls_patch", "bench"),
    Recipe("stablelm", "clip", "mlp3x_gelu", "pad", "patch", "bench"),
    Recipe("llama", "siglip", "mlp2x_gelu", "square", "cls_patch", "bench"),
    Recipe("llama", "siglip", "mlp2x_gelu", "square", "cls_patch", "transformers"),
    Recipe("llama", "clip", "mlp2x_gelu", "square", "patch", "transformers"),
    Recipe("stablelm", "siglip", "mlp2x_gelu", "square", "patch", "transformers"),
)
PAIRS = (
    ("llama", "siglip"),
    ("llama", "clip"),
    ("phi", "siglip"),
    ("stablelm", "clip"),
    ("stablelm", "siglip"),
)
# Every pair of parts with every connector; aspect, selection and layout take turns.
SLOW = tuple(
    Recipe(
        *pair,
        connector,
        ("square", "pad")[index % 2],
        ("patch", "cls_patch")[(index // 2 + turn) % 2],
        ("merged", "separate", "bench")[(index + turn) % 3],
        seed=1,
    )
    for index, pair in enumerate(PAIRS)
    for turn, connector in enumerate(("linear", "mlp2x_gelu", "mlp3x_gelu", "resampler"))
)


class Steps:
    """Keeps the logits of a batch of one."""

    def __init__(self) -> None:
        self.logits: list[NDArray[np.float32]] = []

    def append(self, logits: NDArray[np.float32]) -> None:
        self.logits.append(logits[0].copy())


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = ((61, 83), (100, 31), (28, 28))
    return [Image.fromarray(generator.integers(0, 256, (*s, 3), np.uint8)) for s in sizes]


def check_parity(checkpoint: Path, bundle: Path, max_new_tokens: int = NEW_TOKENS) -> float:
    """Compares a batch of three prompts with 0, 1 and 2 images, and each prompt alone."""
    reference, model = load_reference(checkpoint), VisionLanguageModel.load(bundle)
    images = pictures()
    for image in images:
        expected = reference.image_inputs(image)["pixel_values"]
        np.testing.assert_array_equal(model.prepare(image).inputs["pixel_values"], expected)
    requests = [
        Request(prompt=question, images=tuple(images[:count]), max_new_tokens=max_new_tokens)
        for count, question in enumerate(QUESTIONS)
    ]
    batched = model.generate_batch(requests)
    worst = 0.0
    for request, in_batch in zip(requests, batched, strict=True):
        own_images = images[: len(request.images)]
        answer = reference.greedy(as_messages(request), own_images, max_new_tokens)
        steps = Steps()
        alone = model.generate(
            prompt=request.prompt,
            images=own_images,
            max_new_tokens=max_new_tokens,
            on_logits=steps.append,
        )
        assert in_batch.token_ids == alone.token_ids == tuple(answer.token_ids)
        assert in_batch.text == alone.text == answer.text
        worst = max(worst, float(np.abs(np.array(steps.logits) - answer.logits).max()))
    return worst


def as_messages(request: Request) -> list[dict[str, Any]]:
    content: list[dict[str, str]] = [{"type": "image"} for _ in request.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}]


@pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param(recipe, id=recipe.name) for recipe in FAST),
        *(pytest.param(recipe, id=recipe.name, marks=pytest.mark.slow) for recipe in SLOW),
    ],
)
def test_tokens_equal_transformers(recipe: Recipe, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", recipe)
    bundle = tmp_path / "bundle"
    report = export(ExportOptions(checkpoint, bundle), SilentProgress())
    kinds = {"Attention", "TensorScatter", "RotaryEmbedding"}
    operators = report.manifest.graph("decoder").operators
    assert kinds <= operators.keys()
    assert operators["Attention"] == 2
    assert not {"Pow", "ReduceMean", "Neg"} & operators.keys()
    assert check_parity(checkpoint, bundle) <= LOGITS_TOLERANCE


@pytest.mark.slow
def test_smollm2_answers_as_transformers_does(tmp_path: Path) -> None:
    from support.smollm import make_smollm_checkpoint

    checkpoint = make_smollm_checkpoint(tmp_path / "checkpoint")
    export(ExportOptions(checkpoint, tmp_path / "bundle"), SilentProgress())
    assert check_parity(checkpoint, tmp_path / "bundle") <= LOGITS_TOLERANCE
    answer = VisionLanguageModel.load(tmp_path / "bundle", verify=False).generate(
        prompt="What is the capital of France?", max_new_tokens=16
    )
    assert "Paris" in answer.text
