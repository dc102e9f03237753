from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_triton import Asked, FakeTriton, RefusalError, response

RunCli = Callable[..., tuple[int, str, str]]

# What only the process that computes can tell: see README.md on `generate --json`.
NOT_TOLD_BY_A_SERVER = {"backend", "faults"}
SECONDS = 20.0


def test_the_answer_is_printed_as_it_comes(run_cli: RunCli) -> None:
    with FakeTriton().grpc() as url:
        assert run_cli("client", url, "--prompt", "a red circle") == (0, "a red circle\n", "")


def test_json_has_the_keys_of_generate(run_cli: RunCli) -> None:
    from vlmport.cli.generate import _as_json
    from vlmport.runtime.request import GenerationResult

    local = json.loads(_as_json(GenerationResult("", (), 0, 0, "stop", 0.0, 0.0, "")))
    with FakeTriton().http() as url:
        code, out, _ = run_cli("client", url, "--prompt", "a red circle", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == [key for key in local if key not in NOT_TOLD_BY_A_SERVER]
    assert found["text"] == "a red circle"
    assert found["token_ids"] == [100, 101, 102, 2]


def test_options_and_a_chat_reach_the_server(run_cli: RunCli, tmp_path: Path) -> None:
    content = [
        {"type": "image", "path": "cat.png"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": content}]), encoding="utf-8")
    (tmp_path / "cat.png").write_bytes(b"cat")
    (tmp_path / "dog.png").write_bytes(b"dog")

    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        yield response("seen", [1, 2], "stop")

    triton = FakeTriton(script, models={"mine": "READY"})
    options = "--model mine --max-new-tokens 3 --temperature 0.5 --top-k 2 --top-p 0.9 --min-p 0.1"
    more = "--seed 4 --stop a --stop b --repetition-penalty 1.5 --frequency-penalty 0.25"
    last = "--presence-penalty 0.75 --timeout 7 --priority 3"
    with triton.http() as url:
        files = ("--messages", chat, "--image", tmp_path / "dog.png")
        words = [*options.split(), *more.split(), *last.split()]
        assert run_cli("client", url, *files, *words) == (0, "seen\n", "")
    [asked] = triton.asked
    assert asked.inputs["image"] == [b"cat", b"dog"]
    assert asked.inputs["stop"] == ["a", "b"]
    assert (asked.model, asked.priority, asked.timeout_us) == ("mine", 3, 7_000_000)
    assert asked.parameters == {
        "max_tokens": "3",
        "temperature": "0.5",
        "top_k": "2",
        "top_p": "0.9",
        "min_p": "0.1",
        "seed": "4",
        "repetition_penalty": "1.5",
        "frequency_penalty": "0.25",
        "presence_penalty": "0.75",
    }


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_errors_are_messages_with_exit_code_1(run_cli: RunCli, scheme: str) -> None:
    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        raise RefusalError("image 1: not a picture; expected JPEG, PNG or WebP")
        yield {}

    with getattr(FakeTriton(script), scheme)() as url:
        refused = run_cli("client", url, "--prompt", "a")
        unknown = run_cli("client", url, "--prompt", "a", "--model", "other")
    gone = run_cli("client", url, "--prompt", "a")
    for found, words in (
        (refused, "image 1: not a picture; expected JPEG, PNG or WebP"),
        (unknown, "found no model 'other'; available: vlm"),
        (gone, url),
    ):
        code, out, err = found
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert words in err
        assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["client", "load"])
def test_without_the_extra_the_pip_line_is_told(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    for module in [name for name in sys.modules if name.startswith("vlmport.api.client_")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    for module in ("tritonclient.grpc", "tritonclient.grpc.aio", "tritonclient.utils"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    code, out, err = run_cli(verb, "localhost:1", "--prompt", "a")
    assert (code, out) == (1, "")
    assert "pip install 'vlmport[triton]'" in err


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("verb", ["client", "load"])
def test_control_c_cancels_on_the_server(scheme: str, verb: str) -> None:
    has_begun = threading.Event()

    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        for index in range(round(SECONDS / 0.05)):
            yield response("word ", [index])
            has_begun.set()
            if gone.wait(0.05):
                return

    triton = FakeTriton(script)
    with getattr(triton, scheme)() as url:
        command = [sys.executable, "-m", "vlmport", verb, url, "--prompt", "a"]
        client = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        assert has_begun.wait(SECONDS)
        if verb == "client":
            assert client.stdout.read(5) == "word "
        client.send_signal(signal.SIGINT)
        _, err = client.communicate(timeout=SECONDS)
        assert triton.cancelled.wait(SECONDS)
    assert client.returncode == 130
    assert "Traceback" not in err


def test_a_load_test_prints_tables_and_writes_json(run_cli: RunCli, tmp_path: Path) -> None:
    target = tmp_path / "load.json"
    with FakeTriton().grpc() as url:
        words = ("--prompt", "a b", "--clients", "1,2", "--rate", "100", "--count", "5")
        code, out, _ = run_cli("load", url, *words, "--json", target)
    assert code == 0
    for shown in ("1 client ", "2 clients", "100 requests/s", "tokens/s", "p99", "first token"):
        assert shown in out
    points = json.loads(target.read_text(encoding="utf-8"))["points"]
    assert [(one["clients"], one["rate"]) for one in points] == [(1, None), (2, None), (None, 100)]
    assert all(one["figures"]["completed"] == 5 for one in points)


def test_a_load_test_takes_a_file_and_names_its_errors(run_cli: RunCli, tmp_path: Path) -> None:
    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        if asked.inputs["text_input"] == "bad":
            raise RefusalError("queue: full")
        yield response("fine", [1], "stop")

    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "good"}\n{"prompt": "bad"}\n', encoding="utf-8")
    triton = FakeTriton(script)
    with triton.http() as url:
        options = ("--clients", "1", "--count", "4", "--max-new-tokens", "9")
        code, out, _ = run_cli("load", url, "--requests", path, *options)
    assert code == 0
    assert "1 client: 2 x HTTP_400: " in out
    assert "queue: full" in out
    assert {asked.parameters["max_tokens"] for asked in triton.asked} == {"9"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("client", "localhost:1"),
        ("client", "localhost:1", "--prompt", "a", "--messages", "b.json"),
        ("load", "localhost:1"),
        ("load", "localhost:1", "--prompt", "a", "--requests", "b.jsonl"),
        ("load", "localhost:1", "--requests", "b.jsonl", "--image", "c.png"),
        ("load", "localhost:1", "--prompt", "a", "--clients", "many"),
        ("load", "localhost:1", "--prompt", "a", "--rate", "1,x"),
    ],
)
def test_wrong_usage_exits_with_2(run_cli: RunCli, arguments: tuple[str, ...]) -> None:
    code, out, err = run_cli(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_the_client_needs_no_onnxruntime() -> None:
    program = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['torch'] = None\n"
        "from vlmport.cli.main import main; main(sys.argv[1:])"
    )
    with FakeTriton().grpc() as url:
        command = [sys.executable, "-c", program, "client", url, "--prompt", "a circle"]
        finished = subprocess.run(
            command, capture_output=True, text=True, check=False, env=dict(os.environ)
        )
    assert (finished.returncode, finished.stdout) == (0, "a circle\n"), finished.stderr


def test_without_the_http_library_its_pip_line_is_told(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vlmport.api.client_http", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    code, _, err = run_cli("client", "http://localhost:1", "--prompt", "a")
    assert code == 1
    assert "aiohttp: not installed" in err
    assert "pip install 'vlmport[triton]'" in err
