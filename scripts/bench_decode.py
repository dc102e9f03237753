"""Measures decoding and time to first token on the CPU, against the memory and against PyTorch.

Both sides of every ratio are measured in one run, in turn. The model is a synthetic LLaVA: Llama
of 12 layers x 768 and a CLIP-like tower of 576 image tokens, random float32 weights.

    python scripts/bench_decode.py --folder build/bench-decode
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from benching import SETTLE_SECONDS, decode_seconds, environment, seconds
from PIL import Image
from synthetic import LLAMA_12X768, write_checkpoint

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.export.family import load_reference
from vlmport.runtime import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_QUESTION = "What is in the picture?"
_MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}]
_NEW_TOKENS = 64


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-decode"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    checkpoint, bundle = options.folder / "checkpoint", options.folder / "bundle"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, LLAMA_12X768, "float32")
    export(ExportOptions(checkpoint, bundle, overwrite=True), SilentProgress())
    model = endless(VisionLanguageModel.load(bundle, verify=False))
    report = {
        "environment": environment(),
        "decode_and_bandwidth": _bandwidth_section(model, options.rounds),
        "max_length": _max_length_section(model, options.rounds),
        "against_transformers": _transformers_section(model, checkpoint, options.rounds),
    }
    print(json.dumps(report, indent=2))


@dataclass
class TimedSession:
    """An ONNX Runtime session that adds up the time of its bound runs."""

    session: Any
    seconds: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        """Runs the session and counts the time."""
        started = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - started


def _bandwidth_section(model: VisionLanguageModel, rounds: int) -> dict[str, float]:
    """Weight bytes read per token x tokens/s, against reads of a large array, in turn."""
    weights = model.manifest.graph("decoder").parameter_bytes
    big = torch.ones(256 * 1024 * 1024)  # 1 GiB: far larger than any cache
    matrix, vector = big.view(-1, 4096), torch.ones(4096)
    reads: dict[str, Callable[[], object]] = {
        "sum": big.sum,
        "max": big.max,
        "matrix_vector": lambda: matrix @ vector,
    }
    opened: dict[str, Any] = vars(model._backend)["_sessions"]
    plain = dict(opened)
    sessions = {name: TimedSession(plain[name]) for name in ("embed_tokens", "decoder")}
    opened.update(sessions)
    bandwidths, steps, overheads = [], [], []
    for _ in range(rounds):
        time.sleep(SETTLE_SECONDS)
        best = min(seconds(read) for read in reads.values() for _ in range(2))
        time.sleep(SETTLE_SECONDS)
        bandwidths.append(big.nbytes / best)
        timed = list(sessions.values())
        step, total = _decode(model, 64, _NEW_TOKENS, 256, timed)
        steps.append(step)
        overheads.append(total / sum(session.seconds for session in timed) - 1)
    opened.update(plain)
    step = statistics.median(steps)
    # The memory of a shared machine is not always equally fast: a step is held against the
    # bandwidth that was measured right before it.
    pairs = zip(bandwidths, steps, strict=True)
    fractions = [weights / taken / bandwidth for bandwidth, taken in pairs]
    return {
        "read_bandwidth_gb_s": round(statistics.median(bandwidths) / 1e9, 2),
        "read_bandwidth_gb_s_highest": round(max(bandwidths) / 1e9, 2),
        "weight_bytes_per_token": weights,
        "step_ms": round(step * 1e3, 2),
        "tokens_per_second": round(1 / step, 1),
        "decode_gb_s": round(weights / step / 1e9, 2),
        "fraction_of_bandwidth": round(statistics.median(fractions), 3),
        "fraction_of_bandwidth_wanted": 0.9,
        "loop_overhead": round(statistics.median(overheads), 4),
        "loop_overhead_allowed": 0.05,
    }


def _max_length_section(model: VisionLanguageModel, rounds: int) -> dict[str, float]:
    """A step at context 64 with room for 256 and for 16384 tokens, in turn."""
    small, large = [], []
    for _ in range(rounds):
        small.append(_decode(model, context=64, tokens=32, max_length=256)[0])
        large.append(_decode(model, context=64, tokens=32, max_length=16384)[0])
    ratio = statistics.median(b / a for a, b in zip(small, large, strict=True))
    return {
        "step_ms_256": round(statistics.median(small) * 1e3, 2),
        "step_ms_16384": round(statistics.median(large) * 1e3, 2),
        "ratio": round(ratio, 3),
        "ratio_allowed": 1.1,
    }


def _transformers_section(
    model: VisionLanguageModel, checkpoint: Path, rounds: int
) -> dict[str, object]:
    """Time to first token and decoding of one question about a picture, in turn."""
    reference: Any = load_reference(checkpoint)
    reference = replace(
        reference, special_tokens=replace(reference.special_tokens, eos_token_ids=())
    )
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    image = Image.fromarray(pixels)

    def ours(tokens: int) -> tuple[int, ...]:
        result = model.generate(images=[image], prompt=_QUESTION, max_new_tokens=tokens)
        return result.token_ids

    def theirs(tokens: int) -> tuple[int, ...]:
        answer = reference.greedy(_MESSAGES, [image], tokens)
        return tuple(int(token) for token in answer.token_ids)

    same = ours(_NEW_TOKENS) == theirs(_NEW_TOKENS)
    first: dict[str, list[float]] = {"ours": [], "transformers": []}
    step: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("transformers", theirs)):
            time.sleep(SETTLE_SECONDS)
            short = seconds(functools.partial(run, 1))
            long = seconds(functools.partial(run, 1 + _NEW_TOKENS))
            first[name].append(short)
            step[name].append((long - short) / _NEW_TOKENS)
    return {
        "same_tokens": same,
        "ttft_ms": {name: round(statistics.median(v) * 1e3, 1) for name, v in first.items()},
        "step_ms": {name: round(statistics.median(v) * 1e3, 2) for name, v in step.items()},
        "ttft_ratio": round(_ratio(first), 2),
        "ttft_ratio_wanted": 1.0,
        "decode_ratio": round(_ratio(step), 2),
        "decode_ratio_wanted": 1.2,
    }


def _ratio(times: dict[str, list[float]]) -> float:
    pairs = zip(times["ours"], times["transformers"], strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def _decode(
    model: VisionLanguageModel,
    context: int,
    tokens: int,
    max_length: int,
    timed: Sequence[TimedSession] = (),
) -> tuple[float, float]:
    """(median seconds of a step, seconds of all steps) after a prompt of random embeddings."""

    def reset() -> None:
        for session in timed:
            session.seconds = 0.0

    steps = decode_seconds(model, context, tokens, max_length, reset)
    return statistics.median(steps), sum(steps)


def endless(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model without an end-of-sequence token: every answer has the asked length."""
    tokens = replace(model.manifest.special_tokens, eos_token_ids=())
    model.manifest = replace(model.manifest, special_tokens=tokens)
    return model


if __name__ == "__main__":
    main()
