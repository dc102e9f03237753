from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmport.api.questions import read_questions
from vlmport.api.scoring import Metric
from vlmport.errors import InputError


def written(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_all_forms_of_a_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"image": "a.png", "question": "What?", "answer": "x", "id": 7, "kind": "shape"},
        "",
        {"image": ["a.png", "b/c.png"], "prompt": "Which?", "answers": ["x", "y"]},
        {"question_id": 3, "image": "a.png", "text": "Is there?", "label": "no", "category": "adv"},
        {"question": "No picture?", "answer": "x", "further": 1},
    )
    first, second, third, fourth = read_questions(path, "exact")
    assert (first.id, first.kind, first.text, first.references) == ("7", "shape", "What?", ("x",))
    assert second.images == (tmp_path / "a.png", tmp_path / "b" / "c.png")
    assert (second.id, second.kind, second.references) == ("3", "", ("x", "y"))
    assert (third.id, third.kind, third.references) == ("3", "adv", ("no",))
    assert fourth.images == ()


def test_all_wrong_lines_are_named_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"question": "What?", "answer": "x"},
        "{broken",
        [1, 2],
        {"question": "What?"},
        {"question": "What?", "prompt": "Twice?", "answer": "x"},
        {"question": " ", "answer": "x"},
        {"question": "What?", "answers": []},
        {"question": "What?", "answer": 3},
        {"question": "What?", "answer": "x", "image": [1]},
        {"question": "What?", "answer": "x", "kind": ["a"]},
    )
    with pytest.raises(InputError) as caught:
        read_questions(path, "exact")
    message = str(caught.value)
    assert "found 9 wrong lines" in message
    assert [f"line {number}:" in message for number in range(1, 11)] == [False, *[True] * 9]
    assert "expected one of 'answer', 'answers', 'label'" in message
    assert "found both 'question' and 'prompt'" in message


@pytest.mark.parametrize(
    ("metric", "fields", "words"),
    [
        ("pope", {"answer": "maybe"}, 'expects "yes" or "no"'),
        ("pope", {"answers": ["yes", "no"]}, 'expects "yes" or "no"'),
        ("vqa", {"answers": ["a", "b", "c"]}, "those of ten people"),
    ],
)
def test_a_metric_may_not_allow_an_answer(
    tmp_path: Path, metric: Metric, fields: dict[str, object], words: str
) -> None:
    path = written(tmp_path, {"question": "What?", **fields})
    with pytest.raises(InputError, match=words):
        read_questions(path, metric)
    assert read_questions(path, "exact")


def test_a_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "What?", "answer": "x"}, "{broken")
    assert len(read_questions(path, "exact", limit=1)) == 1


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_questions(tmp_path / "none.jsonl", "exact")
    with pytest.raises(InputError, match="found no question"):
        read_questions(written(tmp_path, "", " "), "exact")
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path, "exact")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl", "exact")
