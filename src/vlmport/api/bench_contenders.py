"""What is timed: a bundle on a backend, or the PyTorch model of its checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vlmport.api.bench_prompts import bench_pictures
from vlmport.backend_names import DEFAULT_BACKEND
from vlmport.runtime import VisionLanguageModel
from vlmport.runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.bench_prompts import BenchPrompt
    from vlmport.contract import Precision
    from vlmport.runtime.request import Piece

__all__ = [
    "TORCH_CONTENDERS",
    "BundleContender",
    "Contender",
    "ContenderSpec",
    "DecodeTiming",
    "TellsWaiting",
    "is_on_gpu",
    "open_contender",
]

TORCH_CONTENDERS = ("torch", "torch-compile")


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """What a worker process opens.

    Attributes:
        name: a backend, "torch" or "torch-compile".
        bundle: folder of the bundle.
        engines: folder of its engines; None for the backend's own choice.
        checkpoint: folder of the checkpoint; only PyTorch needs it.
        precision: of the bundle; PyTorch computes in the same.
        on_gpu: whether it computes on a GPU.
        threads: worker threads on the CPU.
    """

    name: str
    bundle: Path
    engines: Path | None
    checkpoint: Path | None
    precision: Precision
    on_gpu: bool
    threads: int


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """One measurement of decoding.

    Attributes:
        step_seconds: of each step; each makes one token of every row.
        host_seconds: of each step, what the host spent on it without waiting for the device; None
            where the backend cannot tell.
    """

    step_seconds: tuple[float, ...]
    host_seconds: tuple[float, ...] | None


class Contender(Protocol):
    """One side of the comparison, opened."""

    computes: str

    def first_token(self, prompt: BenchPrompt) -> float:
        """Seconds from pictures and text to the first token.

        Raises:
            VlmportError: if it cannot do that.
        """
        ...

    def decode(self, prompt: BenchPrompt, batch: int, steps: int) -> DecodeTiming:
        """Decodes greedily after the same prompt in every row, whatever the tokens are.

        Raises:
            VlmportError: if it cannot do that.
        """
        ...


@runtime_checkable
class TellsWaiting(Protocol):
    """A backend that counts the seconds that the host has waited for the device so far."""

    @property
    def waited_seconds(self) -> float:
        """In decode steps and in the prompts before them."""
        ...


def is_on_gpu(backend: str) -> bool:
    """Whether a backend of that name computes on a GPU."""
    return backend != DEFAULT_BACKEND


def open_contender(spec: ContenderSpec) -> Contender:
    """Opens a bundle, or loads the PyTorch model.

    Raises:
        VlmportError: if it cannot run here.
    """
    if spec.name in TORCH_CONTENDERS:
        from vlmport.api.bench_torch import TorchContender

        return TorchContender(spec)
    # The backends of engines have no worker threads and refuse a number of them.
    threads = spec.threads if spec.name.startswith(DEFAULT_BACKEND) else None
    model = VisionLanguageModel.load(
        spec.bundle, backend=spec.name, engines=spec.engines, verify=False, threads=threads
    )
    return BundleContender(model)


class BundleContender:
    """A bundle, used as its users do: `VisionLanguageModel.generate_batch`.

    A step is complete when its tokens are on the host, so that no device needs to be waited for.

    Args:
        model: an opened bundle, whose manifest is changed.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        tokens = replace(model.manifest.special_tokens, eos_token_ids=())
        generation = replace(model.manifest.generation, stop_strings=())
        # No answer ends by itself: each has the length that was asked for.
        model.manifest = replace(model.manifest, special_tokens=tokens, generation=generation)
        self._model = model
        self.computes = f"{model.backend}, {model.manifest.precision_words}"

    def first_token(self, prompt: BenchPrompt) -> float:
        """See `Contender.first_token`."""
        pictures = bench_pictures(prompt.num_images)
        started = time.perf_counter()
        self._model.generate(prompt=prompt.text, images=pictures, max_new_tokens=1)
        return time.perf_counter() - started

    def decode(self, prompt: BenchPrompt, batch: int, steps: int) -> DecodeTiming:
        """See `Contender.decode`."""
        backend = self._model._backend
        device = backend if isinstance(backend, TellsWaiting) else None
        times: list[float] = []
        waited: list[float] = []

        def note(piece: Piece) -> None:
            if piece.token_id is not None:
                times.append(time.perf_counter())
                waited.append(device.waited_seconds if device is not None else 0.0)

        pictures = tuple(bench_pictures(prompt.num_images))
        request = Request(prompt.text, images=pictures, max_new_tokens=steps + 1)
        self._model.generate_batch([request] * batch, on_piece=note)
        assert len(times) == batch * (steps + 1)
        taken = _differences(times[batch - 1 :: batch])  # with its last row a step is complete
        if device is None:
            return DecodeTiming(taken, None)
        waits = _differences(waited[batch - 1 :: batch])
        host = tuple(whole - wait for whole, wait in zip(taken, waits, strict=True))
        return DecodeTiming(taken, host)


def _differences(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(after - before for before, after in pairwise(values))
