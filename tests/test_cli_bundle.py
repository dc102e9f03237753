"""The command line with a real bundle: `generate` and `parity` from end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"
TRAINED_CHECKPOINT = EXAMPLES / "tinyllava"
QUESTION = "What shape is there?"

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def drawing() -> tuple[Path, str]:
    """A held-out drawing and a question about it, of the kind that the checkpoint knows."""
    lines = (EXAMPLES / "questions" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    entry = json.loads(lines[0])
    return EXAMPLES / "questions" / entry["image"], entry["text"]


@pytest.fixture(scope="module")
def asked(drawing: tuple[Path, str]) -> tuple[str | Path, ...]:
    """The same as options of the command line."""
    return ("--image", drawing[0], "--prompt", drawing[1])


def test_a_graph_holds_no_path_of_the_machine_that_exported_it(trained_bundle: Path) -> None:
    graphs = sorted(trained_bundle.glob("*.onnx"))
    content = b"".join(graph.read_bytes() for graph in graphs)
    assert graphs
    assert b"site-packages" not in content
    assert str(REPOSITORY).encode() not in content


def test_generate_prints_the_text_alone(
    run_cli: RunCli, trained_bundle: Path, asked: tuple[str | Path, ...]
) -> None:
    code, out, err = run_cli("generate", trained_bundle, *asked)
    assert (code, err) == (0, "")
    assert out.strip()
    assert out.endswith("\n")


def test_generate_json_is_one_object_with_the_promised_keys(
    run_cli: RunCli, trained_bundle: Path, asked: tuple[str | Path, ...]
) -> None:
    arguments = ("generate", trained_bundle, *asked)
    _, text, _ = run_cli(*arguments)
    code, out, err = run_cli(*arguments, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["text"] == text.removesuffix("\n")
    assert answer["generated_tokens"] == len(answer["token_ids"])
    assert 0 < answer["image_tokens"] < answer["prompt_tokens"]
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["ttft_ms"] > 0
    assert answer["tokens_per_second"] >= 0
    assert answer["backend"]


def test_options_reach_the_runtime(
    run_cli: RunCli, trained_bundle: Path, asked: tuple[str | Path, ...]
) -> None:
    arguments = ("generate", trained_bundle, *asked, "--json")
    sampled = (*arguments, "--temperature", "5", "--max-new-tokens", "12", "--top-k", "40")
    first, second, other = (
        json.loads(run_cli(*sampled, "--seed", seed)[1])["token_ids"] for seed in ("1", "1", "2")
    )
    assert first == second != other
    short = json.loads(run_cli(*arguments, "--max-new-tokens", "1")[1])
    assert short["generated_tokens"] == 1


def test_a_stop_text_ends_the_answer(
    run_cli: RunCli, trained_bundle: Path, asked: tuple[str | Path, ...]
) -> None:
    arguments = ("generate", trained_bundle, *asked, "--json")
    whole = json.loads(run_cli(*arguments)[1])["text"]
    stop = whole.strip()[1:3]
    cut = json.loads(run_cli(*arguments, "--stop", stop)[1])
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole[: whole.index(stop)]


def test_a_chat_from_a_file_equals_the_same_prompt(
    run_cli: RunCli, trained_bundle: Path, drawing: tuple[Path, str], tmp_path: Path
) -> None:
    def answer(*options: str | Path) -> list[int]:
        code, out, err = run_cli("generate", trained_bundle, "--json", *options)
        assert (code, err) == (0, "")
        token_ids: list[int] = json.loads(out)["token_ids"]
        return token_ids

    picture, question = drawing
    image_part = {"type": "image"}
    chat = [{"role": "user", "content": [image_part, {"type": "text", "text": question}]}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(chat))
    prompted = answer("--image", picture, "--prompt", question)
    assert answer("--image", picture, "--messages", file) == prompted

    shutil.copy(picture, tmp_path / "beside.png")
    image_part["path"] = "beside.png"
    file.write_text(json.dumps(chat))
    assert answer("--messages", file) == prompted
    code, _, err = run_cli("generate", trained_bundle, "--image", picture, "--messages", file)
    assert code == 1
    assert "images: found 2" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[", "not valid JSON"),
        ("{}", "messages"),
        ('[{"role": "user", "content": [{"type": "sound"}]}]', "expected type"),
    ],
)
def test_a_file_that_is_no_chat_is_a_clear_error(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_text(content)
    code, out, err = run_cli("generate", trained_bundle, "--messages", file)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens: found 0"),
        (("--max-new-tokens", "-3"), "max_new_tokens: found -3"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", "1.5"), "top_p"),
        (("--top-k", "-1"), "top_k"),
        (("--stop", ""), "stop_strings"),
        (("--image", "absent.png"), "absent.png"),
    ],
)
def test_bad_options_are_clear_errors(
    run_cli: RunCli, trained_bundle: Path, options: tuple[str, ...], message: str
) -> None:
    code, out, err = run_cli("generate", trained_bundle, "--prompt", QUESTION, *options)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err


def test_a_text_file_named_png_is_a_clear_error(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    file.write_text("not a picture")
    code, _, err = run_cli("generate", trained_bundle, "--image", file, "--prompt", QUESTION)
    assert code == 1
    assert str(file) in err


def test_a_damaged_bundle_is_a_clear_error(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained_bundle, tmp_path / "copy")
    with (copy / "decoder.onnx").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\0\1\2\3")
    (copy / "projector.onnx").unlink()
    code, out, err = run_cli("generate", copy, "--prompt", QUESTION)
    assert (code, out) == (1, "")
    assert "2 faults found" in err
    assert "decoder.onnx: sha256" in err
    assert "projector.onnx: no such file" in err


def test_parity_passes_and_writes_its_reports(
    run_cli: RunCli, trained_bundle: Path, asked: tuple[str | Path, ...], tmp_path: Path
) -> None:
    reports = ("--json", tmp_path / "report.json", "--html", tmp_path / "report.html")
    case = (*asked, "--max-new-tokens", "8")
    code, out, _ = run_cli("parity", TRAINED_CHECKPOINT, trained_bundle, *case, *reports)
    assert code == 0
    assert "PASS" in out
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "PASS"
    assert "<html" in (tmp_path / "report.html").read_text()


def test_parity_checks_where_its_reports_go_before_it_starts(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    target = tmp_path / "absent" / "report.json"
    code, _, err = run_cli("parity", TRAINED_CHECKPOINT, trained_bundle, "--json", target)
    assert code == 1
    assert "no such folder" in err
    code, _, err = run_cli("parity", TRAINED_CHECKPOINT, trained_bundle, "--html", tmp_path)
    assert code == 1
    assert "a folder; expected a file" in err
