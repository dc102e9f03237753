from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import write_questions
from PIL import Image, ImageChops
from tiny.recipes import EXAMPLES, RECIPES

from vlmport.api.questions import read_questions


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["write_questions.py", *map(str, arguments)])
    write_questions.main()


@pytest.mark.parametrize("family", ["tinyllava", "idefics2"])
def test_the_default_seed_gives_the_questions_of_the_training_page(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(monkeypatch, family, tmp_path / "out", "--count", "24")
    written = read_questions(tmp_path / "out" / "DATA.jsonl", "exact")
    folder = EXAMPLES / RECIPES[family].questions_folder
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(written) == len(lines) == 24
    for question, entry in zip(written, map(json.loads, lines), strict=True):
        assert (question.kind, question.text) == (entry["kind"], entry["text"])
        assert question.references == (entry["answer"],)
        names = entry["images"] if "images" in entry else [entry["image"]]
        for path, name in zip(question.images, names, strict=True):
            difference = ImageChops.difference(Image.open(path), Image.open(folder / name))
            assert difference.getbbox() is None


def test_seeds_give_other_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        run(monkeypatch, "fuyu", tmp_path / name, "--count", "10", "--seed", seed)
    first, same, other = (
        (tmp_path / name / "DATA.jsonl").read_text(encoding="utf-8") for name in "abc"
    )
    assert first == same != other


def test_a_folder_that_holds_something_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit, match="not empty"):
        run(monkeypatch, "fuyu", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
