from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vlmport.api.answer_log import Answer, AnswerLog, LogKey
from vlmport.errors import InputError

KEY = LogKey(bundle="b1", data="d1", max_new_tokens=8, batch=4, backend="a fake")
FIRST = {0: Answer("ein Weiß", (5, 2), "stop"), 1: Answer("", (), "length")}
SECOND = {2: Answer("line\nbreak\u2028", (7,), "stop")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    log = AnswerLog(tmp_path / "state.jsonl", KEY)
    log.add(FIRST)
    log.add(SECOND)
    return tmp_path / "state.jsonl"


def test_answers_come_back(path: Path) -> None:
    assert AnswerLog(path, KEY).answers == FIRST | SECOND


def test_half_a_line_is_dropped_and_the_rest_goes_on(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    log = AnswerLog(path, KEY)
    assert log.answers == FIRST
    log.add(SECOND)
    assert path.read_bytes() == content
    assert AnswerLog(path, KEY).answers == FIRST | SECOND


@pytest.mark.parametrize(
    ("name", "value"),
    [("bundle", "b2"), ("data", "d2"), ("max_new_tokens", None), ("batch", 8), ("backend", "x")],
)
def test_a_state_of_something_else_is_refused(path: Path, name: str, value: object) -> None:
    before = path.read_bytes()
    changed: dict[str, object] = {name: value}
    with pytest.raises(InputError, match=f"made with {name} .*this run: ") as caught:
        AnswerLog(path, replace(KEY, **changed))  # type: ignore[arg-type]
    assert str(caught.value).count("this run") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello\n", b"[1]\n", b"{}\n", b"no line break"])
def test_other_files_are_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(InputError):
        AnswerLog(path, KEY)
    assert path.read_bytes() == content


def test_a_wrong_line_is_named(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"question": 3}\n')
    with pytest.raises(InputError, match="line 5: not an answer"):
        AnswerLog(path, KEY)


def test_without_a_file_answers_are_kept_in_memory() -> None:
    log = AnswerLog(None, KEY)
    log.add(FIRST)
    assert log.answers == FIRST
