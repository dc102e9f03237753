"""Says for each family how its tiny checkpoint is built, taught and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny.drawing_lessons import DrawingLessons
from tiny.family import Curriculum, TinyFamily
from tiny.fuyu import build_fuyu, load_fuyu
from tiny.idefics2 import build_idefics2, load_idefics2
from tiny.paligemma import build_paligemma, load_paligemma
from tiny.scene_lessons import ComparingLessons, DetectionLessons, GridLessons
from tiny.tinyllava import build_tinyllava, load_tinyllava
from tiny.training import Schedule

__all__ = ["EXAMPLES", "RECIPES", "Recipe"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one family's tiny checkpoint is made.

    Attributes:
        build: builds the untrained model; torch is seeded before.
        load: builds the model from a saved folder.
        lessons: makes the curriculum for a built model.
        schedule: how long and how fast it learns.
        num_lessons: training examples.
        num_validation: questions by which the best state of the last phase is chosen.
        questions_folder: below examples/, where held-out samples go.
    """

    build: Callable[[], TinyFamily]
    load: Callable[[Path], TinyFamily]
    lessons: Callable[[], Curriculum[Any]]  # of drawings or albums: the recipe does not care
    schedule: Schedule
    num_lessons: int
    num_validation: int
    questions_folder: str


RECIPES = {
    "tinyllava": Recipe(
        build=build_tinyllava,
        load=load_tinyllava,
        lessons=DrawingLessons,
        schedule=Schedule(),
        num_lessons=40_000,
        num_validation=600,
        questions_folder="questions",
    ),
    "paligemma": Recipe(
        build=lambda: build_paligemma(DetectionLessons().corpus()),
        load=load_paligemma,
        lessons=DetectionLessons,
        schedule=Schedule(
            tower_steps=600,
            language_steps=1500,
            joint_steps=0,  # the commands of docs/training.md go on from here
            language_batch=16,
            questions=4,
        ),
        num_lessons=12_000,
        num_validation=200,
        questions_folder="questions-paligemma",
    ),
    "fuyu": Recipe(
        build=lambda: build_fuyu(GridLessons().corpus()),
        load=load_fuyu,
        lessons=GridLessons,
        schedule=Schedule(
            tower_steps=400,
            language_steps=0,
            joint_steps=1600,
            joint_rate=1.5e-3,
            tower_batch=32,
            language_batch=16,
            questions=4,
        ),
        num_lessons=20_000,
        num_validation=600,
        questions_folder="questions-fuyu",
    ),
    "idefics2": Recipe(
        build=lambda: build_idefics2(ComparingLessons().corpus(), EXAMPLES / "tinyllava"),
        load=load_idefics2,
        lessons=ComparingLessons,
        schedule=Schedule(
            tower_steps=1000,
            language_steps=1000,
            joint_steps=0,  # it lost more than it gained: 86.5 % before, 79.2 % half way
            tower_batch=24,
            language_batch=16,
        ),
        num_lessons=20_000,
        num_validation=600,
        questions_folder="questions-idefics2",
    ),
}
