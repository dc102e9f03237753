"""A real tritonserver of scripts/setup_triton for tests and measurements, on free ports."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["TritonServer", "triton_server"]

_REPOSITORY = Path(__file__).resolve().parents[1]
_START_SECONDS = 180.0  # some 20 Python models on two busy cores
_SAMPLE = re.compile(r'^(?P<name>\w+)\{model="(?P<model>[^"]*)"[^}]*\} (?P<value>\S+)$', re.M)


@dataclass(frozen=True, slots=True)
class TritonServer:
    """A running server.

    Attributes:
        http: host:port.
        grpc: host:port.
        metrics: host:port.
        log: file with all that it and its models print.
        process: the server's own.
    """

    http: str
    grpc: str
    metrics: str
    log: Path
    process: subprocess.Popen[bytes]

    def post(self, path: str, content: object, timeout: float = 60.0) -> tuple[int, str]:
        """Status and text of an answer; `path` comes behind /v2/."""
        request = urllib.request.Request(
            f"http://{self.http}/v2/{path}", json.dumps(content).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, model: str, content: object, timeout: float = 60.0) -> tuple[int, Any]:
        """Status and JSON of the endpoint `generate`."""
        status, text = self.post(f"models/{model}/generate", content, timeout)
        return status, json.loads(text)

    def load(self, model: str, timeout: float = 120.0) -> None:
        """Loads a model, or loads it again; returns when it is ready."""
        status, text = self.post(f"repository/models/{model}/load", {}, timeout)
        assert status == 200, text

    def unload(self, model: str) -> None:
        """Asks for the end of a model; running answers go on."""
        status, text = self.post(f"repository/models/{model}/unload", {})
        assert status == 200, text

    def is_ready(self, model: str) -> bool:
        """Whether a model takes requests, as the server says."""
        return self._is_ok(f"http://{self.http}/v2/models/{model}/ready")

    @property
    def is_live(self) -> bool:
        """Whether the server answers."""
        return self._is_ok(f"http://{self.http}/v2/health/live")

    def metric(self, name: str, model: str) -> float:
        """The value of one of a model's metrics."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = {(one["name"], one["model"]): float(one["value"]) for one in _SAMPLE.finditer(text)}
        return found[name, model]

    def wait_for_metric(self, name: str, model: str, wanted: float, seconds: float = 10.0) -> float:
        """Waits until a metric has a value; returns how many seconds that took."""
        started = time.monotonic()
        while (found := self.metric(name, model)) != wanted:
            took = time.monotonic() - started
            assert took < seconds, f"{name} of {model}: {found} after {took:.1f} s, not {wanted}"
            time.sleep(0.02)
        return time.monotonic() - started

    def stubs(self) -> dict[str, int]:
        """Model -> id of the process that runs it."""
        stubs = _stubs(self.process.pid)
        return {Path(words[1]).parents[1].name: process for process, words in stubs.items()}

    def _is_ok(self, address: str) -> bool:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextlib.contextmanager
def triton_server(
    repositories: Sequence[Path],
    log: Path,
    models: Sequence[str] = ("*",),
    packages: Path | None = None,
) -> Iterator[TritonServer]:
    """Starts a server, waits until its models are ready, and ends it whatever happens.

    Args:
        repositories: folders of models.
        log: file for what it prints.
        models: that are loaded; "*" for all.
        packages: `bin` of the environment whose packages the models get; None for the server's.
    """
    ports = _free_ports(3)
    with log.open("wb") as stream:
        process = _start(repositories, ports, models, packages, stream.fileno())
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
    server = TritonServer(http, grpc, metrics, log, process)
    try:
        _wait(server)
        yield server
    finally:
        _end(process)


@functools.cache
def _installed() -> dict[str, str]:
    subprocess.run([_REPOSITORY / "scripts" / "setup_triton"], check=True)
    paths: dict[str, str] = json.loads((_REPOSITORY / ".venv-triton" / "server.json").read_text())
    return paths


def _start(
    repositories: Sequence[Path],
    ports: Sequence[int],
    models: Sequence[str],
    packages: Path | None,
    output: int,
) -> subprocess.Popen[bytes]:
    paths = _installed()
    options = [
        *(f"--model-repository={folder}" for folder in repositories),
        f"--backend-directory={paths['backends']}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        *("--http-address=127.0.0.1", f"--http-port={ports[0]}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}"),
        *("--metrics-address=127.0.0.1", f"--metrics-port={ports[2]}"),
        # The configurations are complete; to complete one, Triton would start each process twice.
        "--disable-auto-complete-config",
        "--model-load-thread-count=4",
    ]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LD_LIBRARY_PATH": paths["library_path"],
        "PATH": f"{packages or paths['bin']}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        [paths["server"], *options],
        env=environment,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    """A server must not outlive tests that were killed; its stubs do not outlive it."""
    set_parent_death_signal = 1  # <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _wait(server: TritonServer) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not server._is_ok(f"http://{server.http}/v2/health/ready"):
        told = server.log.read_text(errors="replace")[-4000:]
        assert server.process.poll() is None, f"tritonserver has ended:\n{told}"
        assert time.monotonic() < deadline, f"tritonserver is not ready:\n{told}"
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the server and all of its stubs, which share its process group.

    One that is asked first waits for idle connections; killed, it leaves its shared memory behind.
    """
    regions = [Path("/dev/shm") / words[2] for words in _stubs(process.pid).values()]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)
    for region in regions:
        region.unlink(missing_ok=True)


def _stubs(server: int) -> dict[int, list[str]]:
    """Process -> words of its command: stub, .../MODEL/1/model.py, region of shared memory, ..."""
    found: dict[int, list[str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[0].endswith("triton_python_backend_stub") and words[5] == str(server):
                found[int(folder.name)] = words
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
