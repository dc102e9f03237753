"""Measures a tiny model: greedy answers, compared exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tiny.family import TinyFamily
from tiny.questions import KINDS, Sample

__all__ = ["accuracy", "answer", "table", "with_wrong_pictures"]

LONGEST_ANSWER = 12  # tokens; the longest right answer has six words, most of one token each
BATCH = 64


def answer(family: TinyFamily, samples: Sequence[Sample]) -> list[str]:
    """Answers single-question prompts greedily, up to the end-of-sequence token.

    Prompts of equal length are answered together, so that nothing is padded.
    """
    prompts = [family.prompt(sample.question.text) for sample in samples]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt.after)].append(index)
    answers = [""] * len(samples)
    for indices in by_length.values():
        for start in range(0, len(indices), BATCH):
            group = indices[start : start + BATCH]
            pixels = torch.stack([family.preprocess(samples[i].drawing.image) for i in group])
            before = torch.tensor([prompts[i].before for i in group])
            after = torch.tensor([prompts[i].after for i in group])
            for index, ids in zip(group, _greedy(family, pixels, before, after), strict=True):
                answers[index] = family.decode_text(ids)
    return answers


def accuracy(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, float]:
    """Returns the share of exact answers of each kind of question, and of all ("overall")."""
    right: dict[str, list[bool]] = {kind: [] for kind in ("overall", *KINDS)}
    for sample, given in zip(samples, answers, strict=True):
        is_right = given == sample.question.answer
        right["overall"].append(is_right)
        right[sample.question.kind].append(is_right)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items() if marks}


def with_wrong_pictures(samples: Sequence[Sample]) -> list[Sample]:
    """Gives every question the drawing of the next question of its kind: a control for guessing.

    A model that looks at the picture answers these about as often right as chance would have it.
    """
    step = len(KINDS)
    moved = [*samples[step:], *samples[:step]]
    return [
        Sample(other.drawing, sample.question) for sample, other in zip(samples, moved, strict=True)
    ]


def table(shares: dict[str, float]) -> str:
    """Formats `accuracy`'s result as one line per kind, in per cent."""
    return "\n".join(f"{kind:10s} {100 * share:5.1f} %" for kind, share in shares.items())


@torch.no_grad()
def _greedy(
    family: TinyFamily, pixel_values: Tensor, before: Tensor, after: Tensor
) -> list[list[int]]:
    """Generates without a cache; the sequences are short.

    Args:
        family: the model.
        pixel_values: float32 [batch, 3, image_size, image_size].
        before: int64 [batch, before_length], prompt ids in front of the image.
        after: int64 [batch, after_length], prompt ids behind the image.
    """
    image_tokens = family.image_tokens(family.patch_features(pixel_values))
    sequence = torch.cat([family.embed(before), image_tokens, family.embed(after)], dim=1)
    batch = sequence.shape[0]
    generated = torch.empty((batch, 0), dtype=torch.int64)
    ended = torch.zeros(batch, dtype=torch.bool)
    for _ in range(LONGEST_ANSWER):
        length = sequence.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
        positions = torch.arange(length).expand(batch, -1)
        hidden = family.decode(sequence, causal, positions)[:, -1:]
        token = family.logits(hidden).argmax(-1)
        generated = torch.cat([generated, token], dim=1)
        ended |= token[:, 0] == family.eos_token_id
        if bool(ended.all()):
            break
        sequence = torch.cat([sequence, family.embed(token)], dim=1)
    return [_until_end(ids, family.eos_token_id) for ids in generated.tolist()]


def _until_end(ids: list[int], eos_token_id: int) -> list[int]:
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
