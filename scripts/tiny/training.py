"""Trains a tiny model in three phases; the same for every family.

Learning all at once from the language loss alone is very slow: the tower gets almost no signal.
So: (1) the tower, under throw-away linear heads that name what is in each patch's cell;
(2) connector and decoder, with the tower frozen; (3) everything, at a lower rate.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tiny.drawings import COLOURS, DIGITS, SHAPES, WORDS, Drawing, drawings
from tiny.family import TinyFamily, Turn
from tiny.packing import IGNORED, pack
from tiny.questions import Question, ask

__all__ = ["Pictures", "Schedule", "make_pictures", "train"]

logger = logging.getLogger(__name__)

CONTENTS = ("nothing", *SHAPES, "digit", "word")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast each phase learns.

    Attributes:
        tower_steps, language_steps, joint_steps: optimizer steps of the three phases.
        tower_rate, language_rate, joint_rate: peak learning rates.
        tower_batch, language_batch: pictures per step (phase 1; phases 2 and 3).
        questions: questions per picture and step.
        checks: how often the third phase is checked and, if better, kept.
    """

    tower_steps: int = 3200
    language_steps: int = 700
    joint_steps: int = 700
    tower_rate: float = 1e-3
    language_rate: float = 2e-3
    joint_rate: float = 5e-4
    tower_batch: int = 64
    language_batch: int = 48
    questions: int = 6
    checks: int = 4


@dataclass(frozen=True, slots=True)
class Pictures:
    """The training drawings, resized once and kept in memory.

    Attributes:
        pixels: uint8 [num_pictures, 3, image_size, image_size].
        contents: int64 [num_pictures, 4], index into CONTENTS for each cell.
        colours: int64 [num_pictures, 4], 0 for an empty cell, else 1 + index into COLOURS.
        whole: int64 [num_pictures, 3], of the whole drawing: digit (0 none), word (0 none), count.
        drawings: the drawings themselves, for their questions.
    """

    pixels: Tensor
    contents: Tensor
    colours: Tensor
    whole: Tensor
    drawings: list[Drawing]


def make_pictures(count: int, seed: int, image_size: int) -> Pictures:
    """Draws the training pictures; PIL's resize is the one the image processors call."""
    drawn = list(itertools.islice(drawings(seed, held_out=False), count))
    pixels = torch.empty((count, 3, image_size, image_size), dtype=torch.uint8)
    contents = torch.zeros((count, 4), dtype=torch.int64)
    colours = torch.zeros((count, 4), dtype=torch.int64)
    whole = torch.zeros((count, 3), dtype=torch.int64)
    names = sorted(COLOURS)
    for row, drawing in enumerate(drawn):
        small = drawing.image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        pixels[row] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        for item in drawing.items:
            content = item.name if item.kind == "shape" else item.kind
            contents[row, list(item.cells)] = CONTENTS.index(content)
            colours[row, list(item.cells)] = 1 + names.index(item.colour)
            if item.kind == "digit":
                whole[row, 0] = 1 + DIGITS.index(item.name)
            elif item.kind == "word":
                whole[row, 1] = 1 + WORDS.index(item.name)
            else:
                whole[row, 2] += 1
    return Pictures(pixels, contents, colours, whole, drawn)


def train(
    family: TinyFamily,
    pictures: Pictures,
    schedule: Schedule,
    check: Callable[[str], None],
    seed: int,
) -> None:
    """Runs the three phases.

    Args:
        family: the untrained model; its weights are changed in place.
        pictures: what to learn from.
        schedule: steps and rates.
        check: called with a name after phases 1 and 2 and `schedule.checks` times in phase 3;
            measures the model and keeps it if it is the best so far.
        seed: of the order of pictures and questions.
    """
    rng = random.Random(seed)
    _teach_tower(family, pictures, schedule, rng)
    check("after the tower phase")
    questioner = _Questioner(family, pictures, schedule, rng)
    for parameter in family.tower.parameters():
        parameter.requires_grad_(False)
    others = [p for p in family.module.parameters() if p.requires_grad]
    _descend(others, questioner.loss, schedule.language_steps, schedule.language_rate, "language")
    check("after the language phase")
    for parameter in family.tower.parameters():
        parameter.requires_grad_(True)
    every = max(1, schedule.joint_steps // schedule.checks)

    def check_sometimes(step: int) -> None:
        if step % every == 0 or step == schedule.joint_steps:
            check(f"joint step {step}")

    weights = list(family.module.parameters())
    rate = schedule.joint_rate
    _descend(weights, questioner.loss, schedule.joint_steps, rate, "joint", check_sometimes)


def _teach_tower(
    family: TinyFamily, pictures: Pictures, schedule: Schedule, rng: random.Random
) -> None:
    """Phase 1: every patch feature has to tell its cell's content and the whole drawing's."""
    cells = torch.tensor(family.patch_cells)
    sizes = [len(CONTENTS), 1 + len(COLOURS), 4, 1 + len(DIGITS), 1 + len(WORDS), 4]
    heads = nn.Linear(family.feature_size, sum(sizes))

    def loss() -> Tensor:
        rows = torch.tensor(rng.sample(range(len(pictures.drawings)), schedule.tower_batch))
        features = family.patch_features(family.normalize(pictures.pixels[rows]))
        everywhere = pictures.whole[rows][:, None].expand(-1, len(cells), -1)
        targets = [
            pictures.contents[rows][:, cells],
            pictures.colours[rows][:, cells],
            cells.expand(len(rows), -1),
            *everywhere.unbind(-1),
        ]
        losses = [
            functional.cross_entropy(scores.flatten(0, 1), target.flatten())
            for scores, target in zip(heads(features).split(sizes, -1), targets, strict=True)
        ]
        return torch.stack(losses).sum()

    weights = [*family.tower.parameters(), *heads.parameters()]
    _descend(weights, loss, schedule.tower_steps, schedule.tower_rate, "tower")


class _Questioner:
    """Draws batches of pictures with questions and gives the loss of their answers."""

    def __init__(
        self, family: TinyFamily, pictures: Pictures, schedule: Schedule, rng: random.Random
    ) -> None:
        self.family = family
        self.pictures = pictures
        self.schedule = schedule
        self.rng = rng
        self.before = torch.tensor(family.prompt("").before)
        self.prefix_length = len(self.before) + family.num_image_tokens

    def loss(self) -> Tensor:
        """Returns the mean cross-entropy of the answers of a new batch; one in four is "turns"."""
        batch = self.schedule.language_batch
        rows = self.rng.sample(range(len(self.pictures.drawings)), batch)
        branch = self.rng.random() < 0.75
        turns = [self._turns(row, branch=branch) for row in rows]
        packed = pack(turns, self.prefix_length, self.family.eos_token_id, branch=branch)
        pixel_values = self.family.normalize(self.pictures.pixels[torch.tensor(rows)])
        image_tokens = self.family.image_tokens(self.family.patch_features(pixel_values))
        before = self.family.embed(self.before).expand(batch, -1, -1)
        text = self.family.embed(packed.input_ids)
        inputs_embeds = torch.cat([before, image_tokens, text], dim=1)
        hidden = self.family.decode(inputs_embeds, packed.allowed, packed.position_ids)
        asked = packed.labels != IGNORED
        logits = self.family.logits(hidden[:, self.prefix_length :][asked])
        return functional.cross_entropy(logits, packed.labels[asked])

    def _turns(self, row: int, *, branch: bool) -> list[Turn]:
        """Chooses a picture's questions; what is written, being rare, is always among them."""
        questions = ask(self.pictures.drawings[row], self.rng)
        questions.sort(key=_is_common)
        chosen = questions[: self.schedule.questions]
        self.rng.shuffle(chosen)
        return [
            self.family.turn(question.text, question.answer, is_first=branch or number == 0)
            for number, question in enumerate(chosen)
        ]


def _is_common(question: Question) -> bool:
    return question.kind not in ("digit", "word") or question.answer == "nothing"


def _descend(
    weights: Iterable[nn.Parameter],
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    rate: float,
    name: str,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs AdamW with a short warm-up and a cosine decay to zero."""
    trained = list(weights)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    begin, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], 1.0)
        optimizer.step()
        scheduler.step()
        recent += loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - begin
            logger.info("%s %d/%d: loss %.3f, %.0f s", name, step, steps, recent / 50, seconds)
            recent = 0.0
        after_step(step)
