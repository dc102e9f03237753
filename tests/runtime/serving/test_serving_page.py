"""The examples of docs/serving.md run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.trained import EXAMPLES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def here(trained_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").symlink_to(trained_bundle, target_is_directory=True)
    shutil.copy(EXAMPLES / "questions" / "00_shape.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
def test_the_page_streams_to_threads(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAMS[0], str(PAGE), "exec"), {"__name__": "__main__"})
    first, second, hits = capsys.readouterr().out.splitlines()
    assert first
    assert second
    assert hits == "1 picture was known"


@pytest.mark.usefixtures("here")
def test_the_page_streams_to_event_loops(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAMS[1], str(PAGE), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.endswith("['stop', 'stop']\n")


def test_there_are_no_other_examples() -> None:
    assert len(PROGRAMS) == 2
