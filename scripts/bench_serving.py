"""Measures continuous batching on the CPU: throughput, latency under prefill, reuse, overhead.

Both sides of every ratio are measured in one run, in turn. The model is a synthetic LLaVA: Llama
of 12 layers x 768 and a CLIP-like tower of 576 image tokens, random float32 weights.

    python scripts/bench_serving.py --folder build/bench-decode
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_decode import TimedSession, endless
from benching import SETTLE_SECONDS, environment
from PIL import Image
from synthetic import LLAMA_12X768, TINY_LLAVA, write_checkpoint
from unseen_inputs import unseen_picture, unseen_text

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.runtime import GenerationService, Request, ServingOptions, VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmport.runtime import Piece
    from vlmport.runtime.serving.answer import Answer

_STREAMS = 8
_NEW_TOKENS = 96
_TINY = replace(TINY_LLAVA, text=TINY_LLAVA.text | {"max_position_embeddings": 2048})
_CACHE_TOKENS = _STREAMS * 2048


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-decode"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model of no meaning, to try this")
    options = parser.parse_args()
    checkpoint, bundle = options.folder / "checkpoint", options.folder / "bundle"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, _TINY if options.tiny else LLAMA_12X768, "float32")
    export(ExportOptions(checkpoint, bundle, overwrite=True), SilentProgress())
    model = endless(VisionLanguageModel.load(bundle, verify=False))
    inputs = _Inputs()
    report = {
        "environment": environment(),
        "throughput": _throughput_section(model, inputs, options.rounds),
        "latency_under_text": _latency_section(model, inputs, options.rounds, pictures=False),
        "latency_under_pictures": _latency_section(model, inputs, options.rounds, pictures=True),
        "second_question": _second_question_section(model, inputs, options.rounds),
        "scheduler": _scheduler_section(model, inputs, options.rounds),
    }
    print(json.dumps(report, indent=2))


class _Inputs:
    """Prompts and pictures that have not been seen before: nothing of theirs can be reused."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def text(self, words: int) -> str:
        return unseen_text(self._random, words)

    def picture(self) -> Image.Image:
        return unseen_picture(self._random)


def _throughput_section(
    model: VisionLanguageModel, inputs: _Inputs, rounds: int
) -> dict[str, object]:
    """Tokens/s of one request and of eight at once, prompts included, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: [], 4: [], _STREAMS: []}
    with GenerationService(model, _options()) as service:
        for _ in range(rounds):
            for streams, measured in rates.items():
                requests = [_text_request(inputs, 24, _NEW_TOKENS) for _ in range(streams)]
                time.sleep(SETTLE_SECONDS)
                started = time.perf_counter()
                answers = [service.submit(request) for request in requests]
                tokens = sum(answer.result().generated_tokens for answer in answers)
                measured.append(tokens / (time.perf_counter() - started))
    pairs = zip(rates[_STREAMS], rates[1], strict=True)
    return {
        "new_tokens": _NEW_TOKENS,
        "tokens_per_second": {n: round(statistics.median(rate), 1) for n, rate in rates.items()},
        "ratio": round(statistics.median(many / one for many, one in pairs), 2),
        "ratio_wanted": 4.0,
    }


def _latency_section(
    model: VisionLanguageModel, inputs: _Inputs, rounds: int, *, pictures: bool
) -> dict[str, object]:
    """Times between the tokens of four answers, alone and while long prompts arrive, in turn."""
    alone: list[float] = []
    beside: list[float] = []
    prompts: list[int] = []
    with GenerationService(model, _options()) as service:
        for _ in range(rounds):
            alone += _gaps(service, inputs)
            beside += _gaps(service, inputs, (prompts, pictures))
    median, p99 = statistics.median(beside), float(np.percentile(beside, 99))
    return {
        "gaps": len(beside),
        "arrived_prompts": len(prompts),
        "arrived_prompt_tokens": round(statistics.mean(prompts)),
        "alone_median_ms": _ms(statistics.median(alone)),
        "alone_p99_ms": _ms(float(np.percentile(alone, 99))),
        "median_ms": _ms(median),
        "p99_ms": _ms(p99),
        "longest_ms": _ms(max(beside)),
        "p99_to_median": round(p99 / median, 2),
        "p99_to_median_allowed": 3.0,
        "p99_to_median_alone": round(p99 / statistics.median(alone), 2),
    }


def _gaps(
    service: GenerationService, inputs: _Inputs, arriving: tuple[list[int], bool] | None = None
) -> list[float]:
    """Seconds between the tokens of four answers; meanwhile one long prompt follows the other."""
    times: list[list[float]] = [[] for _ in range(4)]
    answers = [_timed(service, _text_request(inputs, 24, 2 * _NEW_TOKENS), into) for into in times]
    while arriving is not None and not any(answer.is_done for answer in answers):
        prompts, pictures = arriving
        images = (inputs.picture(),) if pictures else ()
        text = inputs.text(24 if pictures else 400)
        long = service.submit(Request(prompt=text, images=images, max_new_tokens=4))
        prompts.append(long.result().prompt_tokens)
    for answer in answers:
        answer.result()
    # All four decode from the last one's first token on.
    begun = max(each[0] for each in times)
    return [b - a for each in times for a, b in itertools.pairwise(each) if a >= begun]


def _timed(service: GenerationService, request: Request, into: list[float]) -> Answer:
    return service.submit(request, on_piece=lambda _: into.append(time.perf_counter()))


def _second_question_section(
    model: VisionLanguageModel, inputs: _Inputs, rounds: int
) -> dict[str, object]:
    """Time to first token of two questions about one picture, one after the other."""
    first: list[float] = []
    second: list[float] = []
    with GenerationService(model, ServingOptions(cache_tokens=_CACHE_TOKENS)) as service:
        for _ in range(rounds):
            picture = inputs.picture()
            for measured in (first, second):
                request = Request(prompt=inputs.text(24), images=(picture,), max_new_tokens=8)
                time.sleep(SETTLE_SECONDS)
                measured.append(service.submit(request).result().ttft_ms)
    return {
        "first_ttft_ms": round(statistics.median(first), 1),
        "second_ttft_ms": round(statistics.median(second), 1),
        "ratio": round(statistics.median(b / a for a, b in zip(first, second, strict=True)), 3),
        "ratio_allowed": 0.25,
    }


def _scheduler_section(
    model: VisionLanguageModel, inputs: _Inputs, rounds: int
) -> dict[str, object]:
    """Time of eight streams on top of the time that their sessions run."""
    shares: list[float] = []
    steps: list[float] = []
    with _timed_sessions(model) as sessions, GenerationService(model, _options()) as service:
        for _ in range(rounds):
            time.sleep(SETTLE_SECONDS)
            requests = [_text_request(inputs, 24, 2 * _NEW_TOKENS) for _ in range(_STREAMS - 1)]
            others = [service.submit(request) for request in requests]
            # (by the clock, inside of sessions) at each token; told between two runs.
            seen: list[tuple[float, float]] = []

            def note(_: Piece, seen: list[tuple[float, float]] = seen) -> None:
                seen.append((time.perf_counter(), sum(session.seconds for session in sessions)))

            last = service.submit(_text_request(inputs, 24, _NEW_TOKENS), on_piece=note)
            last.result()
            for answer in others:
                answer.cancel()
            taken, run = seen[-1][0] - seen[0][0], seen[-1][1] - seen[0][1]
            steps.append(taken / (len(seen) - 1))
            shares.append(taken / run - 1)
    return {
        "step_ms": _ms(statistics.median(steps)),
        "overhead": round(statistics.median(shares), 4),
        "overhead_allowed": 0.05,
    }


@contextmanager
def _timed_sessions(model: VisionLanguageModel) -> Iterator[list[TimedSession]]:
    """Adds up the time of the sessions that decoding runs."""
    opened: dict[str, Any] = vars(model._backend)["_sessions"]
    plain = {name: opened[name] for name in ("embed_tokens", "decoder")}
    timed = {name: TimedSession(session) for name, session in plain.items()}
    opened.update(timed)
    yield list(timed.values())
    opened.update(plain)


def _options() -> ServingOptions:
    """Nothing is reused: a prompt that was seen would take no time."""
    return ServingOptions(
        num_slots=_STREAMS, cache_tokens=_CACHE_TOKENS, prefix_bytes=0, feature_bytes=0
    )


def _text_request(inputs: _Inputs, words: int, tokens: int) -> Request:
    return Request(prompt=inputs.text(words), max_new_tokens=tokens)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


if __name__ == "__main__":
    main()
