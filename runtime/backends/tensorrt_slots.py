"""Sequences that join and leave, with TensorRT: slots of a cache on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import EngineError, InputError
from vlmport.runtime.backends.slots import CacheSlots, SlotLimits
from vlmport.runtime.backends.tensorrt_buffers import BatchBuffers
from vlmport.runtime.backends.tensorrt_decoding import check_batch
from vlmport.runtime.backends.tensorrt_graphs import DeviceRows
from vlmport.runtime.backends.tensorrt_prefill import PrefillQueue, cache_addresses
from vlmport.runtime.backends.tensorrt_step import RepeatedStep
from vlmport.runtime.device.memory import PinnedBlock
from vlmport.runtime.device.row_memory import GpuRowMemory
from vlmport.runtime.device.sizes import ALIGNMENT, itemsize, size_of
from vlmport.runtime.device.slot_rows import SlotRows
from vlmport.runtime.prompt_pieces import longest_piece

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from vlmport.contract import KVLayout, Manifest
    from vlmport.runtime.backends.base import PromptEmbeddings
    from vlmport.runtime.backends.tensorrt_decoding import DecodeContexts
    from vlmport.runtime.engines.running import RunningEngines
    from vlmport.runtime.prompt_pieces import PromptPiece

__all__ = ["TensorRTSlots"]


class TensorRTSlots(CacheSlots):
    """Slots of the capacity that the engines were built for.

    Every number of slots that are decoded together has execution contexts and a captured graph of
    its own, made when it is first asked for: what was captured must not run after its contexts got
    other shapes.

    Args:
        running: the engines.
        contexts: of decoding.
        manifest: the bundle's.
        num_slots: sequences at most.
        cache_tokens: tokens of all of them together.

    Raises:
        InputError: if so many slots hold more tokens.
        EngineError: if the engines take fewer rows, or the memory does not suffice.
    """

    def __init__(
        self,
        running: RunningEngines,
        contexts: DecodeContexts,
        manifest: Manifest,
        num_slots: int,
        cache_tokens: int,
    ) -> None:
        layout, capacity = manifest.kv_layout, running.engines.options.max_length
        check_batch(contexts, num_slots)
        _check_tokens(num_slots, capacity, cache_tokens)
        longest = contexts.prefill.largest("inputs_embeds", 1)
        limits = SlotLimits(
            num_slots,
            capacity,
            num_slots * capacity,
            layout.bytes_per_token(itemsize(layout.dtype)),
            longest_piece(manifest.attention, longest),
        )
        _check_alignment(layout, num_slots, capacity)
        self._running = running
        self._steps: dict[int, RepeatedStep] = {}  # by how many slots they decode
        self._buffers = BatchBuffers(running, manifest, num_slots)
        self._cache = {name: self._buffers.cache[name] for name in manifest.past_ports}
        memory = GpuRowMemory(running.cuda, running.stream, running.lock, waits=False)
        rows = SlotRows(memory, list(self._cache.values()), layout, capacity)
        self._row_bytes = rows.row_bytes
        super().__init__(manifest, limits, rows)
        self._prompts = PrefillQueue(running, contexts.prefill, manifest)
        shape = (num_slots, manifest.dimensions.vocab_size)
        self._logit_bytes = size_of("float32", shape[1:])
        self._pinned = PinnedBlock(running.cuda, {"logits": ("float32", shape)})
        self._buffers.close_with(self._pinned.close)
        # Memory that was never written may hold NaN, which stays NaN when multiplied by 0.
        running.stream.clear(self._buffers.cache.address, self._buffers.cache.size)

    def close(self) -> None:
        """Frees the cache; see `SlotDecoding.close`."""
        with self._running.lock:
            for step in self._steps.values():
                step.close()
            self._steps = {}
            self._buffers.close()

    def _run_prompt(
        self, slot: int, prompt: PromptEmbeddings, pieces: Iterable[PromptPiece]
    ) -> NDArray[np.float32]:
        assert isinstance(prompt, DeviceRows)  # from this backend
        offset = slot * self._row_bytes
        cache = {name: address + offset for name, address in self._cache.items()}
        with self._running.lock:
            for piece in pieces:
                logits, size = self._prompts.queue([prompt], piece, cache)
                self._running.stream.copy_out(self._pinned.address, logits, size)
            self._buffers.wait()
            chosen: NDArray[np.float32] = self._pinned["logits"][0].copy()
            return chosen

    def _run_step(
        self, token_ids: NDArray[np.int64], filled: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        count, control = len(token_ids), self._buffers.control
        with self._running.lock:
            if count not in self._steps:
                self._steps[count] = self._repeated_step(count)
            self._buffers.chosen["token_ids"][:count, 0] = token_ids
            control["write_indices"][:count] = filled
            control["position_ids"][:count, 0] = filled + self._first_position
            control["valid_lengths"][:count] = filled + 1
            self._steps[count].run()
            self._buffers.wait()
            return self._pinned["logits"][:count].copy()

    def _repeated_step(self, count: int) -> RepeatedStep:
        running, buffers = self._running, self._buffers
        embed = running.context("embed_tokens", "default", captured=True)
        decode = running.context("decoder", "decode", captured=True)

        def bind() -> None:
            embeds = buffers.work["inputs_embeds"]
            embed.set_shapes({"input_ids": (count, 1)})
            embed.bind({"input_ids": buffers.device_chosen["token_ids"], "inputs_embeds": embeds})
            inputs = {**buffers.cache.fields, **buffers.device_control.fields}
            inputs["inputs_embeds"] = buffers.work.fields["inputs_embeds"]
            decode.set_shapes({name: (count, *one.shape[1:]) for name, one in inputs.items()})
            addresses = cache_addresses(decode, self._cache)
            addresses |= {name: buffers.device_control[name] for name in buffers.control.fields}
            addresses |= {"inputs_embeds": embeds, "logits": buffers.work["logits"]}
            decode.bind(addresses)

        def queue() -> None:
            buffers.queue_control()
            buffers.queue_tokens()
            embed.enqueue()
            decode.enqueue()
            size = count * self._logit_bytes
            running.stream.copy_out(self._pinned.address, buffers.work["logits"], size)

        return RepeatedStep(running, (embed, decode), bind, queue)


def _check_tokens(num_slots: int, capacity: int, cache_tokens: int) -> None:
    if num_slots * capacity > cache_tokens:
        msg = (
            f"cache: found {cache_tokens} tokens (cache_tokens) for {num_slots} slots; each takes "
            f"the {capacity} of the engines (max_length), whatever it holds, so that "
            f"{cache_tokens // capacity} slots fit; ask for {num_slots * capacity} tokens or for "
            "fewer slots, or build the engines again with a smaller --max-length"
        )
        raise InputError(msg)


def _check_alignment(layout: KVLayout, num_slots: int, capacity: int) -> None:
    """Prompts run in rows of the cache, which begin where TensorRT lets a tensor begin."""
    shape = (layout.num_kv_heads, capacity, layout.head_dim)
    if num_slots > 1 and size_of(layout.dtype, shape) % ALIGNMENT:
        msg = (
            f"cache: found rows of {capacity} tokens (max_length), {size_of(layout.dtype, shape)} "
            f"bytes; expected a multiple of {ALIGNMENT}, where TensorRT's tensors begin; build the "
            "engines again with a `--max-length` that is a multiple of 64"
        )
        raise EngineError(msg)
