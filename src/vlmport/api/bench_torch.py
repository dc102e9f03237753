"""The PyTorch model of a checkpoint as a side of a benchmark."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import transformers

from vlmport.api.bench_contenders import DecodeTiming
from vlmport.api.bench_prompts import bench_pictures
from vlmport.errors import InputError
from vlmport.export.family import load_reference
from vlmport.export.reference import DecodingReference

if TYPE_CHECKING:
    from vlmport.api.bench_contenders import ContenderSpec
    from vlmport.api.bench_prompts import BenchPrompt

__all__ = ["TorchContender"]


class TorchContender:
    """transformers' model, eager with a growing cache, or compiled with a static one.

    Decoding is the plain loop: forward, the likeliest token, forward; no `generate`, whose own
    checks would count against PyTorch. What is compiled is the decode step, as transformers does
    it: with fullgraph, so that nothing falls back to eager unseen.

    Args:
        spec: what to load.

    Raises:
        InputError: if there is no checkpoint, or PyTorch sees no GPU and one is wanted.
    """

    def __init__(self, spec: ContenderSpec) -> None:
        if spec.checkpoint is None:
            msg = f"{spec.name}: found no checkpoint; give the bundle's source with --checkpoint"
            raise InputError(msg)
        if spec.on_gpu and not torch.cuda.is_available():
            msg = (
                f"{spec.name}: torch {torch.__version__} sees no CUDA GPU; expected one, since the "
                "bundle runs on a GPU; install a CUDA build of torch"
            )
            raise InputError(msg)
        torch.set_num_threads(spec.threads)
        # The same advice at each of a hundred prompts says nothing about speed.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        reference = load_reference(spec.checkpoint, spec.precision)
        if not isinstance(reference, DecodingReference):
            msg = f"{spec.checkpoint}: its family's reference cannot decode by itself; leave it out"
            raise InputError(msg)
        self._device = "cuda" if spec.on_gpu else "cpu"
        reference.move_to(self._device)
        self._reference = reference
        self._model = reference.causal_model
        self._compiles = spec.name == "torch-compile"
        self._compiled: Any = None
        form = "torch.compile, static cache" if self._compiles else "eager, growing cache"
        self.computes = f"torch {torch.__version__} on {self._device}, {form}, {spec.precision}"

    def first_token(self, prompt: BenchPrompt) -> float:
        """See `Contender.first_token`: transformers' processors and its `generate`.

        Raises:
            InputError: for the compiled model, whose prefill is that of the eager one.
        """
        if self._compiles:
            msg = "the decode step alone is compiled; its first token is that of torch"
            raise InputError(msg)
        parts: list[dict[str, str]] = [{"type": "image"} for _ in range(prompt.num_images)]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt.text}]}]
        pictures = bench_pictures(prompt.num_images)
        started = time.perf_counter()
        self._reference.greedy(messages, pictures, 1)  # its results are numpy arrays
        return time.perf_counter() - started

    @torch.no_grad()
    def decode(self, prompt: BenchPrompt, batch: int, steps: int) -> DecodeTiming:
        """See `Contender.decode`."""
        ids = torch.tensor([prompt.token_ids] * batch, device=self._device)
        cache = self._cache(ids.shape[1] + steps)
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        forward = self._step_forward()
        token_ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        token_ids.tolist()
        ends = [time.perf_counter()]
        for _ in range(steps):
            output = forward(input_ids=token_ids, past_key_values=cache, use_cache=True)
            token_ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            token_ids.tolist()  # waits for the device, as a caller who shows the text does
            ends.append(time.perf_counter())
        taken = (after - earlier for earlier, after in pairwise(ends))
        return DecodeTiming(tuple(taken), None)

    def _cache(self, length: int) -> Any:
        config = self._model.config.get_text_config(decoder=True)
        if self._compiles:
            return transformers.StaticCache(config=config, max_cache_len=length)
        return transformers.DynamicCache(config=config)

    def _step_forward(self) -> Any:
        if not self._compiles:
            return self._model
        if self._compiled is None:
            # reduce-overhead records CUDA graphs, which a CPU has not.
            mode = "reduce-overhead" if self._device == "cuda" else "default"
            self._compiled = torch.compile(
                self._model.forward, mode=mode, fullgraph=True, dynamic=False
            )
        return self._compiled
