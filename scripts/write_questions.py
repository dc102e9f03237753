"""Writes held-out questions of a tiny checkpoint's curriculum for `vlmport evaluate`.

    python scripts/write_questions.py tinyllava questions --count 1200
    vlmport evaluate BUNDLE questions/DATA.jsonl

The folder then has the drawings as PNG files, which keep every pixel, and DATA.jsonl, which names
them. Equal arguments give equal files. The default seed is that of docs/training.md's tables, so
that the same count gives the same questions; no drawing of any seed is a training drawing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tiny.questions import Pictured, Sample
from tiny.recipes import RECIPES

__all__ = ["write_questions"]

HELDOUT_SEED = 3  # scripts/train_tiny.py's
DATA_NAME = "DATA.jsonl"


def main() -> None:
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=sorted(RECIPES))
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--count", type=int, default=1200, help="questions")
    parser.add_argument("--seed", type=int, default=HELDOUT_SEED)
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count: found {arguments.count}; expected 1 or more")
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        sys.exit(f"error: {arguments.folder}: not empty; choose a new folder")
    samples = RECIPES[arguments.family].lessons().heldout(arguments.count, arguments.seed)
    write_questions(samples, arguments.folder)
    print(f"{len(samples)} questions in {arguments.folder / DATA_NAME}")


def write_questions(samples: list[Sample[Pictured]], folder: Path) -> None:
    """Writes one line a question, and its drawing or drawings beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, sample in enumerate(samples):
        question, images = sample.question, sample.drawing.images
        marks = [""] if len(images) == 1 else [f"_{number}" for number in range(len(images))]
        names = [f"{index:05d}{mark}.png" for mark in marks]
        for name, image in zip(names, images, strict=True):
            image.save(folder / name)
        line = {
            "id": f"{index:05d}",
            "image": names[0] if len(names) == 1 else names,
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
        }
        lines.append(json.dumps(line))
    (folder / DATA_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
