"""Greedy tokens and logits of bundles equal transformers, for every part and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.checkpoints import Recipe, make_checkpoint
from support.parity_cases import mixed_cases
from support.parity_rows import check_parity_row

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.runtime import VisionLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

# fp32 logits against transformers, absolute; measured 2e-6 to 7e-6 on these models.
LOGITS_TOLERANCE = 1e-4
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


NEW = (
    Recipe("gemma", "siglip", "identity", "square", "patch", "merged", tied=True),
    Recipe("qwen2", "dinov2", "qformer", "square", "patch", "merged", window=24),
    Recipe("llama", "mof", "mof_mlp", "pad", "patch", "merged"),
    Recipe("qwen2", "siglip", "mlp2x_gelu", "square", "patch", "transformers", layers=(-2, -3, 1)),
)
NEW_SLOW = (
    Recipe("gemma", "clip", "mlp2x_gelu", "pad", "cls_patch", "separate", dtype=torch.bfloat16),
    Recipe("qwen2", "siglip", "mlp2x_gelu", "square", "patch", "merged", tied=True),
    Recipe("qwen2", "clip", "linear", "square", "cls_patch", "separate"),
    Recipe("llama", "siglip", "qformer", "pad", "cls_patch", "separate"),
    Recipe("phi", "dinov2", "mlp2x_gelu", "square", "cls_patch", "merged", dtype=torch.float16),
    Recipe("stablelm", "dinov2", "resampler", "pad", "patch", "separate"),
    Recipe("phi", "mof", "mof_mlp", "square", "cls_patch", "separate"),
    Recipe("stablelm", "clip", "identity", "square", "cls_patch", "merged"),
    Recipe("gemma", "dinov2", "identity", "pad", "patch", "merged"),
    Recipe("llama", "clip", "mlp2x_gelu", "square", "patch", "transformers", activation="silu"),
)


@pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param(recipe, id=recipe.name) for recipe in (*FAST, *NEW)),
        *(
            pytest.param(recipe, id=recipe.name, marks=pytest.mark.slow)
            for recipe in (*SLOW, *NEW_SLOW)
        ),
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
    assert "Resize" not in report.manifest.graph("vision_encoder").operators
    row = check_parity_row("tinyllava", recipe.name, checkpoint, bundle, mixed_cases())
    assert row.logits_error <= LOGITS_TOLERANCE


@pytest.mark.slow
@pytest.mark.longest
def test_smollm2_answers_as_transformers_does(tmp_path: Path) -> None:
    from support.smollm import make_smollm_checkpoint

    checkpoint = make_smollm_checkpoint(tmp_path / "checkpoint")
    export(ExportOptions(checkpoint, tmp_path / "bundle"), SilentProgress())
    bundle = tmp_path / "bundle"
    row = check_parity_row("tinyllava", "SmolLM2-135M", checkpoint, bundle, mixed_cases())
    assert row.logits_error <= LOGITS_TOLERANCE
    answer = VisionLanguageModel.load(tmp_path / "bundle", verify=False).generate(
        prompt="What is the capital of France?", max_new_tokens=16
    )
    assert "Paris" in answer.text
