"""Trains a tiny model in three phases; the same for every family.

Learning all at once from the language loss alone is very slow: the tower gets almost no signal.
So: (1) the tower, under throw-away linear heads that name what each of its features should know;
(2) connector and decoder, with the tower frozen; (3) everything, at a lower rate. What counts as
the tower is for the family to say; a phase of no steps is left out.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tiny.family import Curriculum, Pixels, TinyFamily, Turn
from tiny.packing import IGNORED, embed, pack, pack_alone
from tiny.questions import Pictured

__all__ = ["Lesson", "Schedule", "make_lessons", "train"]

logger = logging.getLogger(__name__)
P = TypeVar("P", bound=Pictured)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast each phase learns.

    Attributes:
        tower_steps, language_steps, joint_steps: optimizer steps of the three phases.
        tower_rate, language_rate, joint_rate: peak learning rates.
        tower_batch, language_batch: examples per step (phase 1; phases 2 and 3).
        questions: questions per example and step.
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
class Lesson(Generic[P]):
    """A training example, its images resized once and kept in memory.

    Attributes:
        pixels: what the model sees of it.
        example: the drawing, for its questions and labels.
    """

    pixels: Pixels
    example: P


def make_lessons(
    family: TinyFamily, curriculum: Curriculum[P], count: int, seed: int
) -> list[Lesson[P]]:
    """Draws the training examples."""
    return [
        Lesson(tuple(family.resize(image) for image in example.images), example)
        for example in itertools.islice(curriculum.examples(seed), count)
    ]


def train(
    family: TinyFamily,
    curriculum: Curriculum[P],
    lessons: list[Lesson[P]],
    schedule: Schedule,
    check: Callable[[str], None],
    seed: int,
) -> None:
    """Runs the three phases.

    Args:
        family: the untrained model; its weights are changed in place.
        curriculum: what is asked about the lessons.
        lessons: what to learn from.
        schedule: steps and rates.
        check: called with a name after phase 2 and `schedule.checks` times in phase 3; measures the
            model and keeps it if it is the best so far.
        seed: of the order of lessons and questions.
    """
    rng = random.Random(seed)
    teacher = _Teacher(family, curriculum, lessons, schedule, rng)
    heads = nn.Linear(family.feature_size, sum(curriculum.label_sizes))
    weights = [*family.tower.parameters(), *heads.parameters()]
    tower_loss = functools.partial(teacher.feature_loss, heads)
    _descend(weights, tower_loss, schedule.tower_steps, schedule.tower_rate, "tower")
    for parameter in family.tower.parameters():
        parameter.requires_grad_(False)
    others = [p for p in family.module.parameters() if p.requires_grad]
    steps, rate = schedule.language_steps, schedule.language_rate
    shared_loss = functools.partial(teacher.answer_loss, alone=False)
    _descend(others, shared_loss, steps, rate, "language")
    if steps:
        check("after the language phase")
    for parameter in family.tower.parameters():
        parameter.requires_grad_(True)
    every = max(1, schedule.joint_steps // schedule.checks)

    def check_sometimes(step: int) -> None:
        if step % every == 0 or step == schedule.joint_steps:
            check(f"joint step {step}")

    weights = list(family.module.parameters())
    steps, rate = schedule.joint_steps, schedule.joint_rate
    exact_loss = functools.partial(teacher.answer_loss, alone=family.sees_whole_prompt)
    _descend(weights, exact_loss, steps, rate, "joint", check_sometimes)


class _Teacher(Generic[P]):
    """Draws batches of lessons and gives the loss of their features or answers."""

    def __init__(
        self,
        family: TinyFamily,
        curriculum: Curriculum[P],
        lessons: list[Lesson[P]],
        schedule: Schedule,
        rng: random.Random,
    ) -> None:
        self.family = family
        self.curriculum = curriculum
        self.lessons = lessons
        self.schedule = schedule
        self.rng = rng

    def feature_loss(self, heads: nn.Linear) -> Tensor:
        """Returns the cross-entropy of what throw-away heads read from each feature."""
        batch = self.rng.sample(self.lessons, self.schedule.tower_batch)
        features = self.family.features([lesson.pixels for lesson in batch])
        targets = torch.cat([self.curriculum.labels(lesson.example) for lesson in batch])
        scores = heads(features).split(list(self.curriculum.label_sizes), -1)
        losses = [
            functional.cross_entropy(score, target, ignore_index=IGNORED)
            for score, target in zip(scores, targets.unbind(-1), strict=True)
        ]
        return torch.stack(losses).sum()

    def answer_loss(self, *, alone: bool) -> Tensor:
        """Returns the mean cross-entropy of the answers of a new batch.

        Args:
            alone: whether each question has a sequence of its own.
        """
        batch = self.rng.sample(self.lessons, self.schedule.language_batch)
        branch = not self.family.talks_in_turns or self.rng.random() < 0.75
        turns = [self._turns(lesson, branch=branch) for lesson in batch]
        prefixes = [self.family.prefix(lesson.pixels) for lesson in batch]
        pad = self.family.eos_token_id
        if alone:
            packed = pack_alone(prefixes, turns, pad)
        else:
            both_ways = self.family.sees_whole_prompt
            packed = pack(prefixes, turns, pad, branch=branch, both_ways=both_ways)
        image_tokens = self.family.image_tokens([lesson.pixels for lesson in batch])
        inputs_embeds = embed(
            self.family, packed.input_ids, [image_tokens[index] for index in packed.examples]
        )
        positions = packed.position_ids + self.family.first_position
        hidden = self.family.decode(inputs_embeds, packed.allowed, positions)
        asked = packed.labels != IGNORED
        return functional.cross_entropy(self.family.logits(hidden[asked]), packed.labels[asked])

    def _turns(self, lesson: Lesson[P], *, branch: bool) -> list[Turn]:
        """Chooses a lesson's questions, the most needed ones among them."""
        chosen = self.curriculum.ask(lesson.example, self.rng)[: self.schedule.questions]
        self.rng.shuffle(chosen)
        return [
            self.family.turn(question.text, question.answer, is_first=branch or number == 0)
            for number, question in enumerate(chosen)
        ]


def _descend(
    weights: Iterable[nn.Parameter],
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    rate: float,
    name: str,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs AdamW with a short warm-up and a cosine decay to zero."""
    if steps == 0:
        return
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
