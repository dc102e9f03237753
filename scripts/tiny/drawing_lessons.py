"""What the tiny TinyLLaVA is taught: the drawings of `tiny.drawings` and questions about them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from tiny.drawings import COLOURS, DIGITS, SHAPES, WORDS, Drawing, drawings
from tiny.questions import KINDS, Question, Sample, ask, heldout

__all__ = ["DrawingLessons"]

CONTENTS = ("nothing", *SHAPES, "digit", "word")


class DrawingLessons:
    """The curriculum; see `tiny.family.Curriculum` for the methods.

    Every patch has to tell its cell's content, colour and place, and the drawing's digit, word and
    number of shapes.
    """

    kinds = KINDS
    label_sizes = (len(CONTENTS), 1 + len(COLOURS), 4, 1 + len(DIGITS), 1 + len(WORDS), 4)

    def __init__(self) -> None:
        """Assumes the patches of the built-in configuration."""
        self.patch_cells = torch.tensor(_patch_cells(8))

    def examples(self, seed: int) -> Iterator[Drawing]:
        """Yields training drawings."""
        return drawings(seed, held_out=False)

    def heldout(self, count: int, seed: int) -> list[Sample[Drawing]]:
        """Makes a held-out set."""
        return heldout(count, seed)

    def labels(self, example: Drawing) -> Tensor:
        """Returns int64 [num_patches, 6]."""
        contents, colours, whole = [0] * 4, [0] * 4, [0] * 3
        for item in example.items:
            content = item.name if item.kind == "shape" else item.kind
            for cell in item.cells:
                contents[cell] = CONTENTS.index(content)
                colours[cell] = 1 + sorted(COLOURS).index(item.colour)
            if item.kind == "digit":
                whole[0] = 1 + DIGITS.index(item.name)
            elif item.kind == "word":
                whole[1] = 1 + WORDS.index(item.name)
            else:
                whole[2] += 1
        rows = [[contents[cell], colours[cell], cell, *whole] for cell in range(4)]
        return torch.tensor(rows)[self.patch_cells]

    def ask(self, example: Drawing, rng: random.Random) -> list[Question]:
        """Lists questions, first those about what is written, being rare."""
        return sorted(ask(example, rng), key=_is_common)


def _is_common(question: Question) -> bool:
    return question.kind not in ("digit", "word") or question.answer == "nothing"


def _patch_cells(side: int) -> list[int]:
    """Lists the drawing's cell of each patch in row-major order, but of the dropped first one."""
    half = side // 2
    cells = [row // half * 2 + column // half for row in range(side) for column in range(side)]
    return cells[1:]
