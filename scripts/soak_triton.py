"""Keeps a Triton server at twice its capacity and looks whether anything grows or gets stuck.

Writes the repository of a bundle with --backend python, starts the server of scripts/setup_triton,
and lets twice as many clients as the model has places (slots and queue) ask without a pause:
pictures, sampling and stop strings mixed, some with too little time, some that hang up in the
middle, some with a picture that is none. Prints one JSON object; exits with 1 if memory grew by
more than 5 % after the first third, a request had no end, or a slot stayed taken.

    python scripts/soak_triton.py examples/tinyllava --minutes 15
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import random
import sys
import tempfile
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from triton_server import triton_server

from vlmport.api.bench_device import environment
from vlmport.api.client import connected
from vlmport.api.client_wire import wire_request
from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.api.triton import TritonOptions, write_repository
from vlmport.errors import ServerError
from vlmport.runtime import Request, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triton_server import TritonServer

    from vlmport.api.client_wire import Connection, WireRequest

__all__ = ["SoakReport", "mixed_questions", "soak"]

_MODEL = "vlm"
_SLOTS, _QUEUE = 4, 4
_CLIENTS = 2 * (_SLOTS + _QUEUE)
_STUCK_SECONDS = 60.0
_GROWTH = 1.05
_KIB = 1024


@dataclass(slots=True)
class SoakReport:
    """What happened.

    Attributes:
        seconds: of load.
        ends: how many requests ended how: "answered", "left" (by their client), or the status and
            first words of an error.
        stuck: requests without any end.
        memory: (seconds, MiB of the server, MiB of each model's process by name), in turn.
        growth: the most memory after the first third, over the memory at its end.
        left_active: slots that were still taken when all clients had gone.
        left_waiting: requests that were still waiting then.
        counted: the service's own counters.
    """

    seconds: float
    ends: dict[str, int] = field(default_factory=dict)
    stuck: int = 0
    memory: list[tuple[float, int, dict[str, int]]] = field(default_factory=list)
    growth: float = 0.0
    left_active: int = -1
    left_waiting: int = -1
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        found = {
            "no request was answered": "answered" not in self.ends,
            "no request was refused, so that the server was never full": not any(
                "queue:" in end for end in self.ends
            ),
            f"{self.stuck} requests had no end": self.stuck > 0,
            f"memory grew to {self.growth:.3f} of what it was": self.growth > _GROWTH,
            f"{self.left_active} slots stayed taken": self.left_active != 0,
            f"{self.left_waiting} requests stayed in the queue": self.left_waiting != 0,
        }
        return [fault for fault, is_so in found.items() if is_so]


def main() -> int:
    """Runs the soak and prints what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a folder below examples/, or a bundle")
    parser.add_argument("--minutes", type=float, default=15.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlmport-soak-") as name:
        folder = Path(name)
        bundle = options.checkpoint
        if not (bundle / "manifest.json").exists():
            bundle = folder / "bundle"
            export(ExportOptions(options.checkpoint, bundle), SilentProgress())
        report = soak(bundle, mixed_questions(), options.minutes * 60, folder)
    told = {
        "environment": dataclasses.asdict(environment(threads=1)),
        "slots": _SLOTS,
        "queue": _QUEUE,
        "clients": _CLIENTS,
        **dataclasses.asdict(report),
        "faults": report.faults,
    }
    print(json.dumps(told, indent=2))
    for seconds, server, models in report.memory:
        row = " ".join(f"{model} {size}" for model, size in models.items())
        print(f"{seconds:7.1f} s   server {server} MiB   {row} MiB", file=sys.stderr)
    return 1 if report.faults else 0


def soak(bundle: Path, requests: Sequence[Request], seconds: float, folder: Path) -> SoakReport:
    """Puts a server under load.

    Args:
        bundle: that answers.
        requests: are sent in a mixed order.
        seconds: of load.
        folder: for the repository and the log.
    """
    repository = folder / "repository"
    options = TritonOptions(bundle, repository, backend="python", max_batch=_SLOTS)
    write_repository(options, SilentProgress())
    config = repository / _MODEL / "config.pbtxt"
    text = config.read_text()
    default = 'key: "max_queue"\n  value { string_value: "64" }'
    assert default in text
    config.write_text(text.replace(default, default.replace("64", str(_QUEUE))))
    with triton_server([repository], folder / "server.log", [_MODEL]) as server:
        report = SoakReport(seconds)
        wires = [wire_request(request) for request in requests]
        asyncio.run(_load(server, wires, report))
        _settle(server, report)
    return report


def mixed_questions() -> list[Request]:
    """The questions of examples/questions, with options in turn."""
    folder = Path(__file__).resolve().parents[1] / "examples" / "questions"
    lines = (folder / "heldout.jsonl").read_text().splitlines()
    kinds = itertools.cycle(
        [
            Request(""),
            Request("", sampling=SamplingOptions(temperature=6.0, seed=3), max_new_tokens=200),
            Request("", stop_strings=("e",)),
            Request("", sampling=SamplingOptions(temperature=6.0), max_new_tokens=60),
        ]
    )
    rows = [json.loads(line) for line in lines]
    return [
        dataclasses.replace(kind, prompt=row["text"], images=(folder / row["image"],))
        for row, kind in zip(rows, kinds, strict=False)
    ]


async def _load(server: TritonServer, wires: Sequence[WireRequest], report: SoakReport) -> None:
    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(_CLIENTS):
            group.create_task(_client(server, wires, report, started, random.Random(number)))
        group.create_task(_watch_memory(server, report, started))


async def _client(
    server: TritonServer,
    wires: Sequence[WireRequest],
    report: SoakReport,
    started: float,
    chance: random.Random,
) -> None:
    # Every third by HTTP.
    url = server.grpc if chance.randrange(3) else f"http://{server.http}"
    async with connected(url) as connection:
        while time.monotonic() - started < report.seconds:
            wire = chance.choice(wires)
            kind = chance.random()
            if kind < 0.1:
                wire = dataclasses.replace(wire, timeout_us=chance.randrange(1_000, 200_000))
            elif kind < 0.15:
                wire = dataclasses.replace(wire, images=(b"\x89PNG no picture",))
            leaves_after = chance.randrange(1, 20) if kind > 0.8 else None
            try:
                async with asyncio.timeout(_STUCK_SECONDS):
                    end = await _ask(connection, wire, leaves_after)
            except TimeoutError:
                report.stuck += 1
                continue
            report.ends[end] = report.ends.get(end, 0) + 1
            if "queue:" in end:
                await asyncio.sleep(0.05)  # a client that is refused comes back a little later


async def _ask(connection: Connection, wire: WireRequest, leaves_after: int | None) -> str:
    count, finish_reason = 0, ""
    async with aclosing(connection.stream(_MODEL, wire)) as parts:
        try:
            async for part in parts:
                count, finish_reason = count + 1, part.finish_reason
                if leaves_after is not None and count >= leaves_after and not finish_reason:
                    return "left"
        except ServerError as error:
            # Behind the server's address: the subject of our message.
            words = str(error).partition(": ")[2].split(":")[0]
            return f"{error.kind} {words}:"
    return "answered" if finish_reason else "ended without its last response"


async def _watch_memory(server: TritonServer, report: SoakReport, started: float) -> None:
    """Thirty rows of a table, and how much the last two thirds of them differ."""
    while (now := time.monotonic() - started) < report.seconds:
        if server.process.poll() is not None:
            told = server.log.read_text(errors="replace")[-3000:]
            msg = f"tritonserver ended after {now:.0f} s, {report.ends}:\n{told}"
            raise RuntimeError(msg)
        stubs = {model: _resident_mib(process) for model, process in server.stubs().items()}
        report.memory.append((round(now, 1), _resident_mib(server.process.pid), stubs))
        await asyncio.sleep(report.seconds / 30)
    sums = [size + sum(stubs.values()) for _, size, stubs in report.memory]
    warm = len(sums) // 3
    report.growth = max(sums[warm:]) / sums[warm]


def _resident_mib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kib) // _KIB


def _settle(server: TritonServer, report: SoakReport) -> None:
    """What is left when all clients have gone."""
    for _ in range(100):
        report.left_active = int(server.metric("vlmport_active_requests", _MODEL))
        report.left_waiting = int(server.metric("vlmport_waiting_requests", _MODEL))
        if report.left_active == report.left_waiting == 0:
            break
        time.sleep(0.1)
    names = ("finished", "cancelled", "late", "failed", "refused")
    report.counted = {
        name: int(server.metric(f"vlmport_{name}_requests", _MODEL)) for name in names
    }


if __name__ == "__main__":
    sys.exit(main())
