"""What the benchmarks share: the environment, the clock, and a decoder's steps."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmport.api import bench_device
from vlmport.api.bench_device import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.runtime import VisionLanguageModel

__all__ = ["SETTLE_SECONDS", "decode_seconds", "environment", "prefill_seconds", "seconds"]

# The worker threads of torch spin for a while after an operation and would take the other's cores.
SETTLE_SECONDS = 0.5


def environment() -> dict[str, object]:
    """The machine and the versions that a figure belongs to."""
    return {
        **dataclasses.asdict(bench_device.environment(usable_cores())),
        "torch_threads": torch.get_num_threads(),
    }


def seconds(run: Callable[[], object]) -> float:
    """Seconds by the clock."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def prefill_seconds(model: VisionLanguageModel, context: int) -> float:
    """Seconds of a prompt of random embeddings, with its cache."""
    embeds = _embeds(model, context)
    decoding = model._backend.start(1, context + 1)
    return seconds(lambda: decoding.prefill(embeds, np.array([context])))


def decode_seconds(
    model: VisionLanguageModel,
    context: int,
    tokens: int,
    max_length: int,
    on_prefilled: Callable[[], None] = lambda: None,
) -> list[float]:
    """Seconds of each greedy step after a prompt of random embeddings."""
    decoding: Any = model._backend.start(1, max_length)
    logits = decoding.prefill(_embeds(model, context), np.array([context]))
    active = np.array([True])
    on_prefilled()
    steps = []
    for _ in range(tokens):
        started = time.perf_counter()
        logits = decoding.step(logits.argmax(axis=1), active)
        steps.append(time.perf_counter() - started)
    return steps


def median_decode_seconds(model: VisionLanguageModel, context: int, tokens: int) -> float:
    """The median step, with room for the tokens."""
    return statistics.median(decode_seconds(model, context, tokens, context + tokens + 1))


def _embeds(model: VisionLanguageModel, context: int) -> Any:
    hidden = model.manifest.dimensions.hidden_size
    dtype = model.manifest.precision
    return np.random.default_rng(0).normal(size=(1, context, hidden)).astype(dtype)
