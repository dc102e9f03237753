"""What docs/deploy/triton.md tells a newcomer to type, typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from vlmport.runtime import VisionLanguageModel

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "deploy" / "triton.md"
SECONDS = 300
PORTS: tuple[str, ...] = ("8000", "8001", "8002")


def commands_after(words: str) -> list[str]:
    """The commands of the first block after some words of the page."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(words)
    block = re.search(r"```console\n(.*?)```", rest, re.DOTALL)
    assert block is not None
    joined = block[1].replace("\\\n", " ")
    assert all(line.startswith("$ ") for line in joined.splitlines())
    return [line.removeprefix("$ ") for line in joined.splitlines()]


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of this process, with the vlmport that is tested first on PATH."""
    program = tmp_path / "bin" / "vlmport"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vlmport "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def typed(command: str, environment: dict[str, str]) -> str:
    """What a command prints."""
    finished = subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}{finished.stderr}"
    return finished.stdout


@contextmanager
def in_the_background(
    command: str, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command that ends with &; ends it as `kill %1` does."""
    with log.open("wb") as output:
        running = subprocess.Popen(
            ["bash", "-c", f"exec {command.removesuffix('&')}"],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise


def test_five_commands_lead_from_a_bundle_to_a_streamed_answer(
    trained_bundle: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    ports = dict(zip(PORTS, free_ports(3), strict=True))

    def here(command: str) -> str:
        command = command.replace("BUNDLE", shlex.quote(str(trained_bundle)))
        command = command.replace("REPOSITORY", shlex.quote(str(tmp_path / "repository")))
        return re.sub("|".join(PORTS), lambda port: ports[port[0]], command)

    five = [here(command) for command in commands_after("Five commands")]
    assert len(five) == 5
    write, install, serve, wait, ask = five
    assert serve.endswith("&")
    typed(write, environment)
    typed(install, environment)
    log = tmp_path / "server.log"
    with in_the_background(serve, environment, log) as server:
        try:
            typed(wait, environment)
            answer = typed(ask, environment)
            [curl] = commands_after("Without vlmport on the client")
            events = typed(here(curl), environment)
        except AssertionError as error:
            pytest.fail(f"{error}\nthe server's log ends:\n{log.read_text()[-4000:]}")
        assert server.poll() is None
    assert server.returncode == 0

    words = shlex.split(ask)
    image, prompt = words[words.index("--image") + 1], words[words.index("--prompt") + 1]
    model = VisionLanguageModel.load(trained_bundle)
    alone = model.generate(images=[REPOSITORY / image], prompt=prompt)
    assert answer == f"{alone.text}\n"
    parts = [json.loads(line.removeprefix("data:")) for line in events.split("\n") if line]
    asked = json.loads(shlex.split(curl)[-1])
    expected = model.generate(prompt=asked["text_input"], max_new_tokens=asked["max_tokens"])
    assert "".join(part["text_output"] for part in parts) == expected.text
    assert len(parts) >= len(expected.token_ids)
    assert parts[-1]["finish_reason"] == expected.finish_reason


@pytest.mark.parametrize("words", ["", "--http-port=1"])
def test_the_start_script_says_what_it_expects(words: str) -> None:
    finished = subprocess.run(
        [REPOSITORY / "scripts" / "run_triton", *words.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert "expected a model repository of 'vlmport triton'" in finished.stderr
