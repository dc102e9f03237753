"""Trains the tiny checkpoints of examples/ on generated drawings, on a CPU.

    python scripts/train_tiny.py                       # TinyLLaVA: train, measure, write it
    python scripts/train_tiny.py paligemma             # or idefics2, fuyu
    python scripts/train_tiny.py fuyu --evaluate-only  # measure the committed checkpoint

The seeds are fixed and the drawings generated, so the same machine with the same library versions
and thread count gives the same weights. What the defaults took and how many held-out questions
each checkpoint answers exactly: docs/training.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path

import torch
from tiny.evaluation import accuracy, answer, table, with_wrong_pictures
from tiny.questions import Pictured, Sample
from tiny.recipes import RECIPES, Recipe
from tiny.training import Schedule, make_lessons, train

logger = logging.getLogger("train_tiny")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRAINING_SEED, VALIDATION_SEED, HELDOUT_SEED = 1, 2, 3
SAMPLE_DRAWINGS = 24


def main() -> None:
    """Parses the command line, trains unless told not to, and measures the saved checkpoint."""
    arguments = _parse_arguments()
    recipe = RECIPES[arguments.family]
    folder = arguments.output or EXAMPLES / arguments.family
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    if not arguments.evaluate_only:
        _train(recipe, arguments, folder)
    family = recipe.load(folder)
    samples = recipe.lessons().heldout(arguments.heldout, HELDOUT_SEED)
    print(table(accuracy(samples, answer(family, samples))))
    wrong = with_wrong_pictures(samples)
    print("control, each question with another picture:")
    print(table(accuracy(wrong, answer(family, wrong))))
    _write_samples(
        samples[:SAMPLE_DRAWINGS], arguments.samples or EXAMPLES / recipe.questions_folder
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", nargs="?", choices=sorted(RECIPES), default="tinyllava")
    parser.add_argument("--output", type=Path, help="the checkpoint; examples/FAMILY if not given")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, not from scratch")
    parser.add_argument("--samples", type=Path, help="the folder of held-out drawings")
    parser.add_argument("--pictures", type=int, help="training examples")
    parser.add_argument("--heldout", type=int, default=1200, help="held-out questions")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--evaluate-only", action="store_true", help="measure --output as it is")
    for field in dataclasses.fields(Schedule):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), help="instead of the family's own")
    return parser.parse_args()


def _train(recipe: Recipe, arguments: argparse.Namespace, folder: Path) -> None:
    begin = time.monotonic()
    names = [field.name for field in dataclasses.fields(Schedule)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    schedule = dataclasses.replace(recipe.schedule, **given)
    torch.manual_seed(TRAINING_SEED)
    family = recipe.load(arguments.start) if arguments.start else recipe.build()
    curriculum = recipe.lessons()
    count = arguments.pictures or recipe.num_lessons
    lessons = make_lessons(family, curriculum, count, TRAINING_SEED)
    logger.info("%d drawings in %.0f s", count, time.monotonic() - begin)
    validation = curriculum.heldout(recipe.num_validation, VALIDATION_SEED)
    best = -1.0

    def check(name: str) -> None:
        nonlocal best
        shares = accuracy(validation, answer(family, validation))
        logger.info("%s:\n%s", name, table(shares))
        if shares["overall"] > best:
            best = shares["overall"]
            family.save(folder)

    train(family, curriculum, lessons, schedule, check, TRAINING_SEED)
    logger.info("trained in %.1f minutes", (time.monotonic() - begin) / 60)


def _write_samples(samples: list[Sample[Pictured]], folder: Path) -> None:
    """Writes a few held-out drawings as PNG files, and heldout.jsonl naming them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, sample in enumerate(samples):
        images = sample.drawing.images
        marks = [""] if len(images) == 1 else [f"_{number}" for number in range(len(images))]
        names = [f"{index:02d}_{sample.question.kind}{mark}.png" for mark in marks]
        for name, image in zip(names, images, strict=True):
            image.save(folder / name, optimize=True)
        shown = {"image": names[0]} if len(names) == 1 else {"images": names}
        lines.append(json.dumps({**shown, **dataclasses.asdict(sample.question)}))
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
