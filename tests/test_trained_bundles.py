"""Bundles of the trained checkpoints: equal to PyTorch, and right about held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.parity_rows import check_parity_row
from support.trained import exported
from tiny.evaluation import accuracy
from tiny.recipes import EXAMPLES, RECIPES

from vlmport.api.builtin_cases import Case, builtin_cases
from vlmport.runtime import Request, VisionLanguageModel

HELDOUT_SEED = 3  # scripts/train_tiny.py's
LONGEST_ANSWER = 24


@pytest.fixture(scope="module", params=sorted(RECIPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(name: str) -> Path:
    return exported(name)


@pytest.fixture(scope="module")
def model(bundle: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(bundle)


def samples(name: str, count: int) -> list[Any]:  # of drawings, or of albums of drawings
    return list(RECIPES[name].lessons().heldout(count, HELDOUT_SEED))


def ask(model: VisionLanguageModel, asked: Sequence[Any], batch: int = 12) -> list[str]:
    requests = [
        Request(
            prompt=sample.question.text,
            images=tuple(sample.drawing.images),
            max_new_tokens=LONGEST_ANSWER,
        )
        for sample in asked
    ]
    groups = [requests[start : start + batch] for start in range(0, len(requests), batch)]
    results = [result for group in groups for result in model.generate_batch(group)]
    return [result.text.strip() for result in results]


def test_answers_equal_transformers(name: str, bundle: Path) -> None:
    """On pictures of the training's kind and on others."""
    drawn = [
        Case(
            f"held out {index}",
            (
                *({"type": "image"} for _ in sample.drawing.images),
                {"type": "text", "text": sample.question.text},
            ),
            tuple(sample.drawing.images),
        )
        for index, sample in enumerate(samples(name, 6))
    ]
    # A prompt without a picture is no prompt of every family.
    pictured = [case for case in builtin_cases() if case.images]
    check_parity_row(name, "trained", EXAMPLES / name, bundle, (*pictured, *drawn))


def test_nine_of_ten_held_out_questions_are_answered_exactly(
    name: str, model: VisionLanguageModel
) -> None:
    asked = samples(name, 240)
    shares = accuracy(asked, ask(model, asked))
    assert shares["overall"] >= 0.9, shares


@pytest.mark.slow
def test_a_thousand_held_out_questions(name: str, model: VisionLanguageModel) -> None:
    asked = samples(name, 1000)
    shares = accuracy(asked, ask(model, asked))
    assert shares["overall"] >= 0.9, shares


def test_detected_shapes_lie_where_they_were_drawn(name: str, model: VisionLanguageModel) -> None:
    """Boxes in pixels of the user's picture, which here is larger than the model's."""
    asked = [sample for sample in samples(name, 120) if sample.question.kind == "detect"]
    if not asked:
        assert name != "paligemma"
        return
    found = 0
    for sample in asked:
        scene = sample.drawing.scenes[0]
        large = scene.image.resize((3 * scene.image.width, 3 * scene.image.height), 0)
        result = model.generate(prompt=sample.question.text, images=[large], max_new_tokens=24)
        cell = large.width / scene.columns
        label = sample.question.text.removeprefix("detect ")
        drawn = [
            tuple(cell * edge for edge in (s.row, s.column, s.row + s.span, s.column + s.span))
            for s in scene.shapes
            if s.name == label
        ]
        boxes = [astuple(region.box) for region in result.regions]
        assert result.faults == ()
        # The far edge of the picture is location 1023 of 1024.
        is_right = len(boxes) == len(drawn) and np.allclose(boxes, drawn, atol=large.width / 500)
        found += is_right and all(region.label == label for region in result.regions)
    assert found >= 0.8 * len(asked), (found, len(asked))
