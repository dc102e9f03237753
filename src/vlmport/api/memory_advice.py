"""Whether engines fit on a GPU, and what would fit where they do not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmport.api.memory_plan import Memory, Planner
from vlmport.errors import InputError, VlmportError
from vlmport.manifest import load_manifest
from vlmport.runtime.device.cuda import load_cuda
from vlmport.runtime.device.sizes import itemsize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vlmport.api.memory_plan import MemoryPlan
    from vlmport.contract_engines import BuildOptions

__all__ = ["available_memory", "plan_memory"]


@dataclass(frozen=True, slots=True)
class _Smaller:
    """A precision that `vlmport quantize` makes.

    Attributes:
        words: for people.
        decoder_bytes: of one of the decoder's weights; of integers with their scales.
        is_half: whether everything else is in half precision.
    """

    words: str
    decoder_bytes: float
    is_half: bool


# Scales: one for each output channel of int8, one for each 32 weights of int4.
_SMALLER = (
    _Smaller("--precision fp16", 2.0, is_half=True),
    _Smaller("--precision fp16, then int8", 1.02, is_half=True),
    _Smaller("--precision fp16, then int4", 0.6, is_half=True),
)
_SMALLER_THAN_HALF = (
    _Smaller("--precision int8", 1.02, is_half=False),
    _Smaller("--precision int4", 0.6, is_half=False),
)


def available_memory(device_memory: float | None) -> Memory | None:
    """What the GPU has: as the user says, or as the GPU at hand says; None without either.

    Args:
        device_memory: GiB; None to ask the GPU at hand.

    Raises:
        InputError: if it is no number above 0.
    """
    if device_memory is not None:
        if not 0 < device_memory < math.inf:
            msg = f"--device-memory: found {device_memory:g}; expected GiB above 0"
            raise InputError(msg)
        return Memory(int(device_memory * (1 << 30)), "given by --device-memory")
    try:
        return Memory(load_cuda().memory()[0], "free on the GPU at hand")
    except VlmportError:
        return None


def plan_memory(bundle: Path, options: BuildOptions, available: Memory | None) -> MemoryPlan:
    """What the engines of a bundle need, and what would fit if they do not.

    Raises:
        BundleError: if the bundle cannot be read.
        EngineError: if the options are out of range.
        GraphError: if the size of a graph's values cannot be told.
    """
    planner = Planner(bundle, load_manifest(bundle))
    plan = planner.plan(options, available)
    return plan if plan.fits is not False else replace(plan, advice=tuple(_advice(planner, plan)))


def _advice(planner: Planner, plan: MemoryPlan) -> Iterator[str]:
    options = plan.options

    def of_batch(batch: int) -> BuildOptions:
        return replace(options, max_batch=batch)

    def of_length(length: int) -> BuildOptions:
        whole = planner.manifest.attention.prompt == "bidirectional"
        chunk = length if whole else min(length, options.prefill_chunk)
        return replace(options, max_length=length, prefill_chunk=chunk)

    def of_chunk(chunk: int) -> BuildOptions:
        return replace(options, prefill_chunk=chunk)

    batch = _largest(planner, plan, of_batch, options.max_batch - 1)
    if batch:
        yield f"--max-batch {batch} fits with max_length {options.max_length}"
    length = _largest(planner, plan, of_length, options.max_length - 1)
    if length:
        yield f"--max-length {length} fits with max_batch {options.max_batch}"
    chunk = 0
    if planner.manifest.attention.prompt == "causal":
        chunk = _largest(planner, plan, of_chunk, options.prefill_chunk - 1)
    if chunk:
        yield f"--prefill-chunk {chunk} fits with both"
    for smaller in _smaller_precisions(planner):
        if plan.available is not None and _estimate(planner, plan, smaller) <= plan.available.size:
            yield f"a bundle of `vlmport quantize {smaller.words}` fits by estimate"
            return


def _largest(
    planner: Planner, plan: MemoryPlan, options: Callable[[int], BuildOptions], most: int
) -> int:
    """The largest number up to `most` that fits; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if planner.plan(options(middle), plan.available).fits:
            low = middle
        else:
            high = middle - 1
    return low


def _smaller_precisions(planner: Planner) -> tuple[_Smaller, ...]:
    manifest = planner.manifest
    if manifest.quantization is not None and manifest.quantization.has_integer_layers:
        return ()  # how many weights there are does not follow from their bytes any more
    return _SMALLER if manifest.precision == "float32" else _SMALLER_THAN_HALF


def _estimate(planner: Planner, plan: MemoryPlan, smaller: _Smaller) -> float:
    decoder = planner.manifest.graph("decoder").parameter_bytes
    weights = decoder / itemsize(planner.manifest.precision) * smaller.decoder_bytes
    others = plan.weight_bytes - decoder
    if not smaller.is_half:
        return weights + others + plan.cache_bytes + plan.activation_bytes + plan.buffer_bytes
    # In half precision attention has kernels that store no scores.
    profiles = [one for graph in plan.graphs for one in graph.profiles]
    activations = max(one.size - one.score_bytes for one in profiles)
    return weights + (others + plan.cache_bytes + activations) / 2 + plan.buffer_bytes
