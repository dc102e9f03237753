"""Trains the tiny TinyLLaVA of examples/tinyllava on generated drawings, on a CPU.

    python scripts/train_tiny.py                     # train, measure, write the checkpoint
    python scripts/train_tiny.py --evaluate-only     # measure the committed checkpoint

The seeds are fixed and the drawings generated, so the same machine with the same library versions
and thread count gives the same weights. The defaults took 42.9 minutes on two shared cores and
answer 91.6 % of the held-out questions exactly (docs/training.md).
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
from tiny.questions import Sample, heldout
from tiny.tinyllava import build_tinyllava, load_tinyllava
from tiny.training import Schedule, make_pictures, train

logger = logging.getLogger("train_tiny")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRAINING_SEED, VALIDATION_SEED, HELDOUT_SEED = 1, 2, 3
VALIDATION_COUNT = 600
SAMPLE_DRAWINGS = 24


def main() -> None:
    """Parses the command line, trains unless told not to, and measures the saved checkpoint."""
    arguments = _parse_arguments()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    if not arguments.evaluate_only:
        _train(arguments)
    family = load_tinyllava(arguments.output)
    samples = heldout(arguments.heldout, HELDOUT_SEED)
    print(table(accuracy(samples, answer(family, samples))))
    wrong = with_wrong_pictures(samples)
    print("control, each question with another picture:")
    print(table(accuracy(wrong, answer(family, wrong))))
    _write_samples(samples[:SAMPLE_DRAWINGS], arguments.samples)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=EXAMPLES / "tinyllava")
    parser.add_argument("--samples", type=Path, default=EXAMPLES / "questions")
    parser.add_argument("--pictures", type=int, default=40_000, help="training drawings")
    parser.add_argument("--heldout", type=int, default=1200, help="held-out questions")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--evaluate-only", action="store_true", help="measure --output as it is")
    for field in dataclasses.fields(Schedule):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    return parser.parse_args()


def _train(arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    names = [field.name for field in dataclasses.fields(Schedule)]
    schedule = Schedule(**{name: getattr(arguments, name) for name in names})
    torch.manual_seed(TRAINING_SEED)
    family = build_tinyllava()
    pictures = make_pictures(arguments.pictures, TRAINING_SEED, family.image_size)
    logger.info("%d drawings in %.0f s", arguments.pictures, time.monotonic() - begin)
    validation = heldout(VALIDATION_COUNT, VALIDATION_SEED)
    best = -1.0

    def check(name: str) -> None:
        nonlocal best
        shares = accuracy(validation, answer(family, validation))
        logger.info("%s:\n%s", name, table(shares))
        if shares["overall"] > best:
            best = shares["overall"]
            family.save(arguments.output)

    train(family, pictures, schedule, check, TRAINING_SEED)
    logger.info("trained in %.1f minutes", (time.monotonic() - begin) / 60)


def _write_samples(samples: list[Sample], folder: Path) -> None:
    """Writes a few held-out drawings as PNG files, and heldout.jsonl naming them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, sample in enumerate(samples):
        name = f"{index:02d}_{sample.question.kind}.png"
        sample.drawing.image.save(folder / name, optimize=True)
        lines.append(json.dumps({"image": name, **dataclasses.asdict(sample.question)}))
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
