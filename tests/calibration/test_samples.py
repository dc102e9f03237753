from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmport.calibration.samples import GENERAL_QUESTION, load_samples
from vlmport.errors import CalibrationError


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_every_picture_of_a_folder_is_asked_about(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    samples = load_samples(tmp_path)
    assert [sample.images for sample in samples] == [(tmp_path / "a.JPG",), (tmp_path / "b.png",)]
    assert {sample.prompt for sample in samples} == {GENERAL_QUESTION}


def test_a_folder_with_samples_is_read_by_them(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "unused.png")
    write_lines(tmp_path / "samples.jsonl", {"image": "x.png", "prompt": "What?"})
    (sample,) = load_samples(tmp_path)
    assert (sample.images, sample.prompt) == ((tmp_path / "x.png",), "What?")


def test_lines_of_all_forms(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"image": "below/x.png", "question": "Q?", "answer": "passed over"},
        "",
        {"images": ["x.png", "/absolute/y.png"], "text": "Both?", "new_tokens": 3},
        {"prompt": "No picture."},
        {"image": None, "prompt": "None either."},
        {"image": "x.png"},
    )
    samples = load_samples(path)
    assert [sample.prompt for sample in samples] == [
        "Q?",
        "Both?",
        "No picture.",
        "None either.",
        GENERAL_QUESTION,
    ]
    assert samples[0].images == (tmp_path / "below/x.png",)
    assert samples[1].images == (tmp_path / "x.png", Path("/absolute/y.png"))
    assert samples[1].new_tokens == 3
    assert samples[1].name == "data.jsonl, line 3"
    assert samples[2].images == samples[3].images == ()


def test_all_bad_lines_are_listed_with_their_numbers(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"prompt": "fine"},
        "{not JSON",
        [1, 2],
        {"answer": "no prompt"},
        {"prompt": "  "},
        {"image": 3, "prompt": "x"},
        {"image": ["a.png", None], "prompt": "x"},
        {"prompt": "x", "new_tokens": 0},
        {"prompt": "x", "new_tokens": True},
        "[" * 100_000,
    )
    with pytest.raises(CalibrationError) as caught:
        load_samples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 9 faults found:")
    for number in range(2, 11):
        assert f"\n  line {number}: " in message
    assert "line 1:" not in message


def test_nothing_to_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such path"):
        load_samples(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(CalibrationError, match="found no picture"):
        load_samples(tmp_path)
    with pytest.raises(CalibrationError, match="found no sample"):
        load_samples(write_lines(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load_samples(tmp_path / "binary.jsonl")
