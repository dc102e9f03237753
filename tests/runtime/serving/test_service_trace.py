"""Threads and tasks that ask, leave, and run out of time, all at once: every request ends once."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.served_models import HeldModel, questions, served_model

from vlmport.errors import CancelledError, DeadlineError, InputError, QueueFullError
from vlmport.runtime import GenerationService, Request, ServingOptions

NUM_REQUESTS = 240
FAMILIES = ("fuyu", "idefics2", "paligemma", "tinyllava")


class Clients:
    """Clients of one service, each with a habit of its own.

    Attributes:
        outcomes: how many requests ended in which way.
        ends: how often each request's `on_end` was called.
    """

    def __init__(self, model: HeldModel, service: GenerationService, family: str) -> None:
        self._service = service
        self._requests = [replace(request, max_new_tokens=12) for request in questions(family, 6)]
        self._expected = [
            model.generate_batch([request])[0].token_ids for request in self._requests
        ]
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()

    def ask(self, number: int) -> None:
        """One request; what is told of it must fit to its habit."""
        random = np.random.default_rng(number)
        habit = ("read", "task", "leave", "hurry", "nonsense", "drop")[random.integers(6)]
        chosen = int(random.integers(len(self._requests)))
        try:
            outcome = self._asked(number, habit, chosen, int(random.integers(6)))
        except QueueFullError:
            outcome = "refused"
            time.sleep(0.01)
        with self._lock:
            self.outcomes[outcome] += 1

    def _asked(self, number: int, habit: str, chosen: int, patience: int) -> str:
        request = self._requests[chosen]
        if habit == "nonsense":
            with pytest.raises(InputError):
                self._service.submit(replace(request, images=(b"nonsense",) * len(request.images)))
            return "failed"
        if habit == "task":
            token_ids = asyncio.run(self._awaited(request))
            assert token_ids == self._expected[chosen]
            return "finished"
        timeout_s = 0.002 * patience + 0.001 if habit == "hurry" else None
        try:
            answer = self._service.submit(
                request, timeout_s=timeout_s, on_end=lambda *_: self._ended(number)
            )
            if habit == "drop":
                answer.cancel()
            for count, _ in enumerate(answer):
                if habit == "leave" and count == patience:
                    break
            assert answer.result().token_ids == self._expected[chosen]
        except DeadlineError:
            assert habit == "hurry"
            return "late"
        except CancelledError:
            assert habit in ("leave", "drop")
            return "cancelled"
        return "finished"

    async def _awaited(self, request: Request) -> tuple[int, ...]:
        return (await (await self._service.submit_async(request))).token_ids

    def _ended(self, number: int) -> None:
        self.ends[number] += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_request_ends_once(family: str) -> None:
    model = HeldModel.of(served_model(family))
    options = ServingOptions(num_slots=3, max_queue=4, prefix_bytes=200_000, feature_bytes=20_000)
    with GenerationService(model, options) as service:
        model.slots.let()
        clients = Clients(model, service, family)
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(clients.ask, range(NUM_REQUESTS // len(FAMILIES))))
        service.close()
        told = service.statistics()
    assert (told.active, told.waiting, told.free_slots) == (0, 0, 3)
    found = {
        name: getattr(told, name) for name in ("finished", "cancelled", "late", "failed", "refused")
    }
    assert {name: count for name, count in found.items() if count} == dict(clients.outcomes)
    assert set(clients.ends.values()) == {1}
    assert told.feature_bytes <= 20_000
    assert told.prefix_bytes <= 200_000


PROGRAM = r"""
import sys
from vlmport.runtime import GenerationService, Request, VisionLanguageModel

model = VisionLanguageModel.load(sys.argv[1], verify=False, threads=1)
service = GenerationService(model)
for _ in range(20):
    service.submit(Request(prompt="What is this?"), on_end=lambda *_: sys.stdout.write("end\n"))
sys.stdout.write("done\n")
"""


def test_a_program_that_forgets_to_close_ends(trained_bundle: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(trained_bundle)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.split()
    assert (lines.count("end"), lines.count("done")) == (20, 1)


def test_nothing_remembers_a_closed_service() -> None:
    model = HeldModel.of(served_model("tinyllava"))
    service = GenerationService(model)
    model.slots.let()
    service.submit(questions("tinyllava", 1)[0]).result()
    service.close()
    gone = weakref.ref(service._worker)
    del service
    gc.collect()
    assert gone() is None
