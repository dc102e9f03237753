"""What every backend with a memory of its own must answer as the CPU backend does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmport.runtime import Request, SamplingOptions, VisionLanguageModel
from vlmport.runtime.backends.onnxruntime_device import OnnxRuntimeDeviceBackend

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.runtime.backends.onnxruntime_provider import OrtProvider

__all__ = ["answers", "endless", "mixed_requests", "on_device"]

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8))
QUESTION = "What shape is there?"


def endless(bundle: Path) -> VisionLanguageModel:
    """The bundle with the CPU backend; its answers end at max_new_tokens alone."""
    model = VisionLanguageModel.load(bundle, verify=False, threads=1)
    tokens = replace(model.manifest.special_tokens, eos_token_ids=())
    model.manifest = replace(model.manifest, special_tokens=tokens)
    return model


def on_device(
    model: VisionLanguageModel, bundle: Path, provider: OrtProvider
) -> VisionLanguageModel:
    """The same bundle, run by a provider."""
    backend = OnnxRuntimeDeviceBackend(bundle, model.manifest, provider, threads=1)
    return VisionLanguageModel(model.manifest, model.tokenizer, backend)


def mixed_requests(count: int) -> list[Request]:
    """Prompts and answers of different lengths; every third one is sampled."""
    lengths = (40, 3, 25)
    sampled = SamplingOptions(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5)
    return [
        Request(
            prompt=QUESTION * (index % 3 + 1),
            images=(IMAGE,),
            max_new_tokens=lengths[index % 3],
            sampling=sampled if index % 3 == 2 else SamplingOptions(),
        )
        for index in range(count)
    ]


def answers(
    model: VisionLanguageModel, requests: Sequence[Request]
) -> tuple[list[tuple[int, ...]], list[NDArray[np.float32]]]:
    """Tokens of each request, and the logits of each step: float32 [batch, vocab_size]."""
    steps: list[NDArray[np.float32]] = []
    results = model.generate_batch(requests, on_logits=lambda logits: steps.append(logits.copy()))
    return [result.token_ids for result in results], steps
