"""Families with other kinds of pictures and prompts, in half precision beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from support.fuyu_checkpoints import FuyuRecipe, make_fuyu_checkpoint
from support.idefics2_checkpoints import Idefics2Recipe, make_idefics2
from support.paligemma_checkpoints import PaliGemmaRecipe, make_paligemma
from support.parity_rows import check_parity_row

from vlmport.api.builtin_cases import Case
from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.contract import Precision

SHORT: dict[Precision, str] = {"float16": "fp16", "bfloat16": "bf16"}
MODELS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("fuyu", "hub keys"): lambda folder: make_fuyu_checkpoint(folder, FuyuRecipe()),
    ("idefics2", "split"): lambda folder: make_idefics2(folder, Idefics2Recipe(splits=True)),
    ("paligemma", "Gemma"): lambda folder: make_paligemma(folder, PaliGemmaRecipe()),
    ("paligemma", "Gemma 2, window 8"): lambda folder: make_paligemma(
        folder, PaliGemmaRecipe("gemma2", sliding_window=8)
    ),
}


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def cases() -> tuple[Case, ...]:
    image, question = {"type": "image"}, {"type": "text", "text": "What is in the picture?"}
    return (
        Case("one", (image, question), (picture(61, 83),)),
        Case("wide", (image, {"type": "text", "text": "Why?"}), (picture(100, 31),)),
        Case("two", (image, image, question), (picture(40, 90), picture(9, 20))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", SHORT)
@pytest.mark.parametrize(("family", "row"), MODELS)
def test_answers_as_transformers_in_half_precision(
    family: str, row: str, precision: Precision, tmp_path: Path
) -> None:
    checkpoint, bundle = MODELS[family, row](tmp_path / "checkpoint"), tmp_path / "bundle"
    options = ExportOptions(checkpoint, bundle, precision=SHORT[precision])
    assert export(options, SilentProgress()).manifest.precision == precision
    check_parity_row(family, row, checkpoint, bundle, cases(), 32, precision)
