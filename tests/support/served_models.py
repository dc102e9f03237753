"""Models for tests of the service: of trained checkpoints, and with slots that can be held."""

from __future__ import annotations

import functools
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.trained import EXAMPLES, exported

from vlmport.runtime import GenerationResult, Request, VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["HeldModel", "HeldSlots", "questions", "served_model", "untimed", "wait_until"]


@functools.cache
def served_model(checkpoint: str) -> VisionLanguageModel:
    """The bundle of a trained checkpoint, opened once a process."""
    return VisionLanguageModel.load(exported(checkpoint), threads=1)


def questions(checkpoint: str, count: int) -> list[Request]:
    """Held-out questions about drawings, some families' with several pictures."""
    folder = EXAMPLES / ("questions" if checkpoint == "tinyllava" else f"questions-{checkpoint}")
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [_request(folder, json.loads(line)) for line in lines]


def _request(folder: Path, sample: dict[str, Any]) -> Request:
    names = sample.get("images") or [sample["image"]]
    return Request(prompt=sample["text"], images=tuple(folder / name for name in names))


def untimed(result: GenerationResult) -> GenerationResult:
    """A result without what differs from run to run."""
    return replace(result, ttft_ms=0.0, tokens_per_second=0.0)


def wait_until(is_true: Callable[[], bool]) -> None:
    """Waits for what another thread will do."""
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class HeldSlots:
    """Slots whose decode steps wait until a test lets them go.

    Attributes:
        has_stepped: set when a step has begun.
        is_closed: whether the cache was given back.
    """

    def __init__(self, slots: Any) -> None:
        self._slots = slots
        self._steps = threading.Semaphore(0)
        self.has_stepped = threading.Event()
        self.is_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slots, name)

    def let(self, steps: int = 1_000_000) -> None:
        """Allows as many steps more."""
        self._steps.release(steps)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.has_stepped.set()
        assert self._steps.acquire(timeout=60)
        logits: NDArray[np.float32] = self._slots.step(token_ids)
        return logits

    def close(self) -> None:
        self.is_closed = True
        self._slots.close()


class HeldModel(VisionLanguageModel):
    """A model whose services decode no further than the first token until a test lets them.

    Attributes:
        slots: of the service that was opened last.
    """

    slots: HeldSlots

    @classmethod
    def of(cls, model: VisionLanguageModel) -> HeldModel:
        """Shares the sessions of a model."""
        held = cls.__new__(cls)
        held.__dict__.update(model.__dict__)
        # Answers of any length, so that there is something to be cut off.
        tokens = replace(model.manifest.special_tokens, eos_token_ids=())
        held.manifest = replace(model.manifest, special_tokens=tokens)
        return held

    def start_slots(self, num_slots: int, cache_tokens: int) -> Any:
        self.slots = HeldSlots(super().start_slots(num_slots, cache_tokens))
        return self.slots
