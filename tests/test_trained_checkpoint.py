"""The bundled checkpoint answers held-out questions right, in batches, from the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny.drawings import Drawing
from tiny.evaluation import accuracy, with_wrong_pictures
from tiny.questions import Sample, heldout

from vlmport.export.family import load_reference
from vlmport.runtime import Request, VisionLanguageModel

REPOSITORY = Path(__file__).resolve().parents[1]
# Of scripts/train_tiny.py's held-out set: the same drawings and questions for the same seed.
HELDOUT_SEED = 3


def ask_bundle(
    model: VisionLanguageModel, samples: Sequence[Sample[Drawing]], batch: int
) -> list[str]:
    requests = [
        Request(
            prompt=sample.question.text,
            images=(sample.drawing.image,),
            max_new_tokens=16,
        )
        for sample in samples
    ]
    answers: list[str] = []
    for start in range(0, len(requests), batch):
        results = model.generate_batch(requests[start : start + batch])
        answers += [result.text.strip() for result in results]
    return answers


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(trained_bundle)


def test_nine_of_ten_held_out_questions_are_answered_exactly(model: VisionLanguageModel) -> None:
    samples = heldout(300, HELDOUT_SEED)
    shares = accuracy(samples, ask_bundle(model, samples, batch=8))
    assert shares["overall"] >= 0.9, shares


def test_answers_come_from_the_picture(model: VisionLanguageModel) -> None:
    samples = with_wrong_pictures(heldout(120, HELDOUT_SEED))
    shares = accuracy(samples, ask_bundle(model, samples, batch=8))
    assert shares["overall"] < 0.5, shares


def test_answers_equal_those_of_pytorch(model: VisionLanguageModel) -> None:
    reference = load_reference(REPOSITORY / "examples" / "tinyllava")
    samples = heldout(24, HELDOUT_SEED)
    answers = ask_bundle(model, samples, batch=24)
    for sample, answer in zip(samples, answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": sample.question.text}]
        expected = reference.greedy(
            [{"role": "user", "content": content}], [sample.drawing.image], 16
        )
        assert answer == expected.text.strip()


def test_checkpoint_is_small_and_in_the_released_layout() -> None:
    folder = REPOSITORY / "examples" / "tinyllava"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
