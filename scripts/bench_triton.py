"""Measures what a Triton server adds to the engine inside of it, at 1, 4 and 16 clients.

The same clients ask the same questions of a `GenerationService` in this process and of the server
of scripts/setup_triton, which runs the same service in its Python model; in turn, by gRPC. The
model is the synthetic LLaVA of bench_serving.py, random float32 weights.

    python scripts/bench_triton.py --folder build/bench-triton
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from benching import SETTLE_SECONDS, environment
from synthetic import LLAMA_12X768, write_checkpoint
from triton_server import triton_server
from unseen_inputs import unseen_picture, unseen_text

from vlmport.api.client import connected
from vlmport.api.client_wire import AnswerPart, wire_request
from vlmport.api.export import ExportOptions, export
from vlmport.api.load_loops import Work, closed_loop
from vlmport.api.load_report import inter_token_seconds, load_figures
from vlmport.api.progress import SilentProgress
from vlmport.api.triton import TritonOptions, write_repository
from vlmport.runtime import GenerationService, Request, ServingOptions, VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from triton_server import TritonServer

    from vlmport.api.client_wire import AnswerSource, WireRequest
    from vlmport.api.load_report import RequestRecord

_MODEL = "vlm"
_CLIENTS = (1, 4, 16)
_NEW_TOKENS = 48
_MAX_LENGTH = 2048


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-triton"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkpoint, bundle = options.folder / "checkpoint", options.folder / "bundle"
    repository = options.folder / "repository"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, LLAMA_12X768, "float32")
    export(
        ExportOptions(checkpoint, bundle, max_length=_MAX_LENGTH, overwrite=True), SilentProgress()
    )
    most = max(_CLIENTS)
    write_repository(
        TritonOptions(bundle, repository, backend="python", max_batch=most, overwrite=True),
        SilentProgress(),
    )
    model = VisionLanguageModel.load(bundle, verify=False)
    log = options.folder / "server.log"
    with (
        triton_server([repository], log, [_MODEL]) as server,
        GenerationService(model, ServingOptions(num_slots=most)) as service,
    ):
        measured = {
            "questions": _Measured(images=0, requests=4),
            "questions_about_pictures": _Measured(images=1, requests=1),
        }
        for number in range(options.rounds):
            for each in measured.values():
                asyncio.run(_round(server, service, each, number))
    report = {
        "environment": environment(),
        "new_tokens": _NEW_TOKENS,
        "slots": most,
        **{name: each.report() for name, each in measured.items()},
    }
    print(json.dumps(report, indent=2))


@dataclass(slots=True)
class _Measured:
    """Figures of all rounds.

    Attributes:
        images: of a request.
        requests: of each client in a round.
        records: (where, clients) -> a list for each round.
    """

    images: int
    requests: int
    records: dict[tuple[str, int], list[list[RequestRecord]]] = field(default_factory=dict)

    def report(self) -> dict[str, object]:
        points = {
            f"{clients} clients": {
                **{where: self._figures(where, clients) for where in ("in_process", "server")},
                "server_to_in_process": self._ratios(clients),
            }
            for clients in _CLIENTS
        }
        rates = {n: self._medians("server", n)[0] for n in _CLIENTS}
        return {
            **points,
            "throughput_16_to_1": round(rates[_CLIENTS[-1]] / rates[1], 2),
            "throughput_16_to_1_wanted": 3.5,
            "added_allowed": 1.1,
            "same_tokens": self._has_same_tokens(),
        }

    def _figures(self, where: str, clients: int) -> dict[str, float]:
        rate, ttft, gap = self._medians(where, clients)
        return {
            "tokens_per_second": round(rate, 1),
            "ttft_p50_ms": round(ttft * 1e3, 1),
            "inter_token_p50_ms": round(gap * 1e3, 2),
        }

    def _medians(self, where: str, clients: int) -> tuple[float, float, float]:
        rounds = [_medians(records) for records in self.records[where, clients]]
        rate, ttft, gap = (statistics.median(values) for values in zip(*rounds, strict=True))
        return rate, ttft, gap

    def _ratios(self, clients: int) -> dict[str, float]:
        """Medians over the rounds: both sides of each were measured one after the other."""
        pairs = [
            [theirs / ours for theirs, ours in zip(_medians(a), _medians(b), strict=True)]
            for a, b in zip(
                self.records["server", clients], self.records["in_process", clients], strict=True
            )
        ]
        names = ("tokens_per_second", "ttft", "inter_token")
        columns = zip(*pairs, strict=True)
        return {
            name: round(statistics.median(column), 3)
            for name, column in zip(names, columns, strict=True)
        }

    def _has_same_tokens(self) -> bool:
        return all(
            {one.request: one.token_ids for one in a} == {one.request: one.token_ids for one in b}
            for n in _CLIENTS
            for a, b in zip(self.records["server", n], self.records["in_process", n], strict=True)
        )


def _medians(records: Sequence[RequestRecord]) -> tuple[float, float, float]:
    """Tokens/s, seconds to the first token, seconds between tokens."""
    faults = [record.error for record in records if record.error_kind]
    if faults:
        raise RuntimeError("; ".join(faults))
    gaps = [gap for record in records for gap in inter_token_seconds(record)]
    first = [record.token_s[0] - record.due_s for record in records]
    rate = load_figures(records).tokens_per_second
    return rate, statistics.median(first), statistics.median(gaps)


async def _round(
    server: TritonServer, service: GenerationService, measured: _Measured, number: int
) -> None:
    for clients in _CLIENTS:
        seed = number * 100 + clients
        wires = _requests(clients * measured.requests, measured.images, seed)
        for where in ("in_process", "server") if number % 2 else ("server", "in_process"):
            time.sleep(SETTLE_SECONDS)
            async with AsyncExitStack() as stack:
                connections: list[AnswerSource] = [
                    _InProcess(service)
                    if where == "in_process"
                    else await stack.enter_async_context(connected(server.grpc))
                    for _ in range(clients)
                ]
                work = Work(where, _MODEL, wires, len(wires), None, None, lambda _: None)
                records = await closed_loop(connections, work)
            measured.records.setdefault((where, clients), []).append(records)


def _requests(count: int, images: int, seed: int) -> tuple[WireRequest, ...]:
    """Requests that nobody has asked before, so that nothing of theirs is known."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        pictures = tuple(_picture(random) for _ in range(images))
        prompt = unseen_text(random, 24)
        found.append(Request(prompt=prompt, images=pictures, max_new_tokens=_NEW_TOKENS))
    return tuple(wire_request(one) for one in found)


def _picture(random: np.random.Generator) -> bytes:
    encoded = BytesIO()
    unseen_picture(random).save(encoded, "BMP")  # decoded in no time
    return encoded.getvalue()


class _InProcess:
    """The engine without a server, an `AnswerSource` like any."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    async def stream(self, model: str, request: WireRequest) -> AsyncGenerator[AnswerPart]:
        asked = Request(
            prompt=request.text_input, images=request.images, max_new_tokens=_NEW_TOKENS
        )
        answer = await self._service.submit_async(asked)
        count = 0
        async for piece in answer:
            ids = () if piece.token_id is None else (piece.token_id,)
            count += len(ids)
            yield AnswerPart(piece.text, ids, "", 0, 0, count, None)
        result = await answer
        yield AnswerPart(
            "", (), result.finish_reason, result.prompt_tokens, result.image_tokens, count, None
        )


if __name__ == "__main__":
    main()
