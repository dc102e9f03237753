"""Bundles in float16 and bfloat16 beside transformers in the same dtype and in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from support.checkpoints import Recipe, make_checkpoint
from support.parity_rows import check_parity_row

from vlmport.api.builtin_cases import Case
from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.errors import BundleError
from vlmport.export.family import plan_checkpoint
from vlmport.runtime import VisionLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.contract import Manifest, Precision

FLOAT16: Precision = "float16"
BFLOAT16: Precision = "bfloat16"
FAST: tuple[tuple[Recipe, Precision], ...] = (
    (Recipe("llama", "siglip", "mlp2x_gelu", layout="transformers"), FLOAT16),
    (Recipe("phi", "clip", "resampler", "pad", "cls_patch", dtype=torch.bfloat16), BFLOAT16),
)
SLOW: tuple[tuple[Recipe, Precision], ...] = tuple(
    (recipe, precision)
    for recipe in (
        Recipe("stablelm", "siglip", "linear", layout="separate", seed=2),
        Recipe("llama", "clip", "mlp2x_gelu", layout="transformers", seed=3),
        Recipe("phi", "siglip", "mlp3x_gelu", layout="bench", dtype=torch.float16, seed=4),
        Recipe("llama", "siglip", "mlp2x_gelu", tied=True, dtype=torch.bfloat16, seed=5),
        Recipe("stablelm", "clip", "resampler", "pad", "cls_patch", seed=6),
    )
    for precision in (FLOAT16, BFLOAT16)
)
# The cache is grown in steps of 64 rows; a prompt of some 300 tokens and its answer grow it.
LONG = "How many shapes are there? Which colour? " * 6


def half_cases() -> tuple[Case, ...]:
    """Chats without a picture, with one and with two, of different lengths."""
    generator = np.random.default_rng(0)
    sizes = ((61, 83), (100, 31))
    first, second = (
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in sizes
    )
    image = {"type": "image"}
    return (
        Case("long text", ({"type": "text", "text": LONG},), ()),
        Case("one", (image, {"type": "text", "text": "What is in the picture?"}), (first,)),
        Case("two", (image, image, {"type": "text", "text": "Compare them."}), (first, second)),
    )


def check(recipe: Recipe, precision: Precision, folder: Path) -> tuple[Path, Path, Manifest]:
    """Exports and compares; the fusions of float32 must have fired."""
    checkpoint, bundle = make_checkpoint(folder / "checkpoint", recipe), folder / "bundle"
    short = {FLOAT16: "fp16", BFLOAT16: "bf16"}[precision]
    report = export(ExportOptions(checkpoint, bundle, precision=short), SilentProgress())
    manifest = report.manifest
    assert (manifest.precision, manifest.kv_layout.dtype) == (precision, precision)
    operators = manifest.graph("decoder").operators
    norms = {"llama": "RMSNormalization"}.get(recipe.language_model, "LayerNormalization")
    assert {norms, "Attention", "RotaryEmbedding", "TensorScatter"} <= operators.keys()
    assert not {"Pow", "ReduceMean", "Neg", "Tanh", "Softmax"} & operators.keys()
    # Position ids to float32, cosine and sine to half precision, logits to float32: no other casts.
    assert operators["Cast"] == 4
    check_parity_row("tinyllava", recipe.name, checkpoint, bundle, half_cases(), 32, precision)
    return checkpoint, bundle, manifest


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        *(pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in FAST[:1]),
        *(
            pytest.param(*case, id=f"{case[0].name}-{case[1]}", marks=pytest.mark.slow)
            for case in SLOW
        ),
    ],
)
def test_answers_as_transformers_in_half_precision(
    recipe: Recipe, precision: Precision, tmp_path: Path
) -> None:
    check(recipe, precision, tmp_path)


def test_bfloat16_is_compared_by_emulation_and_refused_by_the_runtime(tmp_path: Path) -> None:
    checkpoint, bundle, manifest = check(*FAST[1], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    message = (
        r"vision_encoder\.onnx: found a bfloat16 graph; ONNX Runtime's CPU provider lacks bfloat16 "
        r"kernels \(Conv is the first\); run it on a GPU, or export the checkpoint with "
        r"--precision fp16 or fp32"
    )
    with pytest.raises(BundleError, match=message):
        VisionLanguageModel.load(bundle)
    check_bits(checkpoint, bundle)
    stored = sum(graph.parameter_bytes for graph in manifest.graphs)
    parameters = sum(_elements(bundle / graph.file) for graph in manifest.graphs)
    assert stored == 2 * parameters


def check_bits(checkpoint: Path, bundle: Path) -> None:
    """Weights that the checkpoint stores in bfloat16 have the same bits in the bundle."""
    _, plan = plan_checkpoint(checkpoint)
    compared = 0
    for name in ("vision_encoder", "projector", "embed_tokens", "decoder"):
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            sources = tensor.name.removesuffix(".T")
            if sources not in plan.store.entries:
                continue
            written = numpy_helper.to_array(tensor, str(bundle))
            stored = plan.store.read(sources)
            expected = stored.T if tensor.name.endswith(".T") else stored
            np.testing.assert_array_equal(
                written.view(np.uint16), np.ascontiguousarray(expected).view(np.uint16)
            )
            compared += 1
    assert compared > 40


def _elements(path: Path) -> int:
    model: Any = onnx.load(path, load_external_data=False)
    planned = [tensor for tensor in model.graph.initializer if tensor.metadata_props]
    return sum(int(np.prod(tensor.dims)) for tensor in planned)
