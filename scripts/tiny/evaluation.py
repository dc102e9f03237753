"""Measures a tiny model: greedy answers, compared exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import torch

from tiny.family import Pixels, TinyFamily
from tiny.packing import embed
from tiny.questions import Pictured, Sample

__all__ = ["accuracy", "answer", "table", "with_wrong_pictures"]

LONGEST_ANSWER = 24  # tokens; the longest right answer names four boxes of four locations each
BATCH = 64
P = TypeVar("P", bound=Pictured)


def answer(family: TinyFamily, samples: Sequence[Sample[P]]) -> list[str]:
    """Answers single-question prompts greedily, up to the end-of-sequence token.

    Prompts of equal length are answered together, so that nothing is padded.
    """
    pixels = [tuple(family.resize(image) for image in sample.drawing.images) for sample in samples]
    prompts = [
        family.prefix(images) + _question_ids(family, sample.question.text)
        for images, sample in zip(pixels, samples, strict=True)
    ]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers = [""] * len(samples)
    for indices in by_length.values():
        for start in range(0, len(indices), BATCH):
            group = indices[start : start + BATCH]
            found = _greedy(family, [pixels[i] for i in group], [prompts[i] for i in group])
            for index, ids in zip(group, found, strict=True):
                answers[index] = family.decode_text(ids)
    return answers


def accuracy(samples: Sequence[Sample[P]], answers: Sequence[str]) -> dict[str, float]:
    """Returns the share of exact answers of all questions ("overall") and of each kind."""
    right: dict[str, list[bool]] = {"overall": []}
    for sample, given in zip(samples, answers, strict=True):
        is_right = given == sample.question.answer
        right["overall"].append(is_right)
        right.setdefault(sample.question.kind, []).append(is_right)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def with_wrong_pictures(samples: Sequence[Sample[P]]) -> list[Sample[P]]:
    """Gives every question the drawing of the next question of its kind: a control for guessing.

    A model that looks at the picture answers these about as often right as chance would have it.
    """
    step = len({sample.question.kind for sample in samples})
    moved = [*samples[step:], *samples[:step]]
    return [
        Sample(other.drawing, sample.question) for sample, other in zip(samples, moved, strict=True)
    ]


def table(shares: dict[str, float]) -> str:
    """Formats `accuracy`'s result as one line per kind, in per cent."""
    return "\n".join(f"{kind:10s} {100 * share:5.1f} %" for kind, share in shares.items())


def _question_ids(family: TinyFamily, question: str) -> list[int]:
    turn = family.turn(question, "", is_first=True)
    return turn.ids[: turn.answer_start]


@torch.no_grad()
def _greedy(
    family: TinyFamily, pixels: Sequence[Pixels], prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Generates without a cache; the sequences are short.

    Args:
        family: the model.
        pixels: the images of each prompt.
        prompts: ids of equal length, up to where the answer begins.
    """
    sequence = embed(family, torch.tensor(prompts), family.image_tokens(pixels))
    batch, prompt_length = sequence.shape[:2]
    generated = torch.empty((batch, 0), dtype=torch.int64)
    ended = torch.zeros(batch, dtype=torch.bool)
    for _ in range(LONGEST_ANSWER):
        length = sequence.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
        if family.sees_whole_prompt:
            allowed[..., :prompt_length] = True
        positions = torch.arange(length).expand(batch, -1) + family.first_position
        hidden = family.decode(sequence, allowed, positions)[:, -1:]
        token = family.logits(hidden).argmax(-1)
        generated = torch.cat([generated, token], dim=1)
        ended |= token[:, 0] == family.eos_token_id
        if bool(ended.all()):
            break
        sequence = torch.cat([sequence, family.embed(token)], dim=1)
    return [_until_end(ids, family.eos_token_id) for ids in generated.tolist()]


def _until_end(ids: list[int], eos_token_id: int) -> list[int]:
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
