"""Sequences that join and leave, with a provider of ONNX Runtime that has a memory of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import InputError
from vlmport.runtime.backends.onnxruntime_memory import empty_cache, host_value, told, write_
from vlmport.runtime.backends.slots import CacheSlots, SlotLimits
from vlmport.runtime.device.cuda import Stream, load_cuda
from vlmport.runtime.device.row_memory import GpuRowMemory, HostRowMemory
from vlmport.runtime.device.sizes import itemsize
from vlmport.runtime.device.slot_rows import SlotRows
from vlmport.runtime.prompt_pieces import longest_piece

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import PromptEmbeddings
    from vlmport.runtime.backends.onnxruntime_memory import OrtMemory
    from vlmport.runtime.device.slot_rows import RowMemory
    from vlmport.runtime.prompt_pieces import PromptPiece

__all__ = ["DeviceSlots"]


class DeviceSlots(CacheSlots):
    """Slots of equal and fixed capacity: `cache_tokens` are shared out at the beginning.

    Values that stay where they are is what CUDA graphs need. The CUDA provider's attention works
    over the whole capacity, so that a cache should be no larger than the answers need. ONNX
    Runtime's Python API cannot copy a part of a value; rows are copied by the CUDA runtime.

    Args:
        embed: session of the graph embed_tokens.
        decoder: session of the graph decoder.
        manifest: the bundle's.
        memory: of the sessions' provider.
        num_slots: sequences at most.
        cache_tokens: tokens of all of them together.

    Raises:
        InputError: if a slot would hold no token.
        EngineError: if cuda-python is missing.
    """

    def __init__(
        self,
        embed: Any,  # onnxruntime ships no types
        decoder: Any,
        manifest: Manifest,
        memory: OrtMemory,
        num_slots: int,
        cache_tokens: int,
    ) -> None:
        layout = manifest.kv_layout
        capacity = min(manifest.dimensions.max_length, cache_tokens // num_slots)
        if not capacity:
            msg = (
                f"cache: found {cache_tokens} tokens (cache_tokens) for {num_slots} slots; "
                "expected one or more for each; ask for a larger cache or fewer slots"
            )
            raise InputError(msg)
        limits = SlotLimits(
            num_slots,
            capacity,
            num_slots * capacity,
            layout.bytes_per_token(itemsize(layout.dtype)),
            longest_piece(manifest.attention),
        )
        self._cache = empty_cache(layout, memory, num_slots, capacity)
        addresses = [value.data_ptr() for value in self._cache]
        rows = SlotRows(_row_memory(memory), addresses, layout, capacity)
        super().__init__(manifest, limits, rows)
        self._embed = embed
        self._decoder = decoder
        self._memory = memory
        self._manifest = manifest
        self._logits = np.empty((num_slots, manifest.dimensions.vocab_size), np.float32)
        self._prompt_binding = decoder.io_binding()
        self._prompt_slot = -1
        self._steps: dict[int, _BoundStep] = {}  # by how many slots they decode

    def close(self) -> None:
        """Frees the cache; see `SlotDecoding.close`."""
        self._prompt_binding.clear_binding_inputs()
        self._prompt_binding.clear_binding_outputs()
        self._steps.clear()
        self._cache.clear()

    def _run_prompt(
        self, slot: int, prompt: PromptEmbeddings, pieces: Iterable[PromptPiece]
    ) -> NDArray[np.float32]:
        binding = self._prompt_binding
        if self._prompt_slot != slot:
            self._bind_rows(binding, slot, slot + 1)
            self._prompt_slot = slot
        rows = prompt.numpy()
        for piece in pieces:
            embeds = np.ascontiguousarray(rows[None, piece.start : piece.stop])
            with told(f"decoder, tokens {piece.start} to {piece.stop} of a prompt"):
                for name, array in {"inputs_embeds": embeds, **piece.inputs()}.items():
                    binding.bind_ortvalue_input(name, self._memory.copy_of(array))
                self._decoder.run_with_iobinding(binding)
        chosen: NDArray[np.float32] = self._logits[slot]
        return chosen

    def _run_step(
        self, token_ids: NDArray[np.int64], filled: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        count = len(token_ids)
        with told("decoder, one step"):
            if count not in self._steps:
                self._steps[count] = self._bound_step(count)
            step = self._steps[count]
            write_(step.token_ids, token_ids[:, None])
            write_(step.position_ids, (filled + self._first_position)[:, None])
            write_(step.write_indices, filled)
            write_(step.valid_lengths, filled + 1)
            self._embed.run_with_iobinding(step.embed)
            self._decoder.run_with_iobinding(step.decode)
        return self._logits[:count]

    def _bound_step(self, count: int) -> _BoundStep:
        memory, manifest = self._memory, self._manifest
        shape = (count, 1, manifest.dimensions.hidden_size)
        embeds = memory.empty(shape, manifest.graph("decoder").inputs[0].dtype)
        step = _BoundStep(
            embed=self._embed.io_binding(),
            decode=self._decoder.io_binding(),
            token_ids=memory.zeros((count, 1), "int64"),
            position_ids=memory.zeros((count, 1), "int64"),
            write_indices=memory.zeros((count,), "int64"),
            valid_lengths=memory.zeros((count,), "int64"),
        )
        step.embed.bind_ortvalue_input("input_ids", step.token_ids)
        step.embed.bind_ortvalue_output("inputs_embeds", embeds)
        step.decode.bind_ortvalue_input("inputs_embeds", embeds)
        for name in ("position_ids", "write_indices", "valid_lengths"):
            step.decode.bind_ortvalue_input(name, getattr(step, name))
        self._bind_rows(step.decode, 0, count)
        return step

    def _bind_rows(self, binding: Any, start: int, stop: int) -> None:
        """Binds some rows of the cache, in place, and the logits, which ONNX Runtime copies."""
        manifest, rows = self._manifest, self._content
        assert isinstance(rows, SlotRows)
        ports = zip(manifest.past_ports, manifest.present_ports, self._cache, strict=True)
        for past, present, value in ports:
            shape = [stop - start, *value.shape()[1:]]
            address = value.data_ptr() + start * rows.row_bytes
            part = self._memory.part(manifest.kv_layout.dtype, shape, address)
            binding.bind_input(past, **part)
            binding.bind_output(present, **part)
        binding.bind_ortvalue_output("logits", host_value(self._logits[start:stop]))


@dataclass(frozen=True, slots=True, eq=False)
class _BoundStep:
    """Bindings of a decode step and the values that it reads, on the device."""

    embed: Any
    decode: Any
    token_ids: Any
    position_ids: Any
    write_indices: Any
    valid_lengths: Any


def _row_memory(memory: OrtMemory) -> RowMemory:
    if memory.device == "cpu":
        return HostRowMemory()
    cuda = load_cuda()
    # ONNX Runtime has a stream of its own; it waits for it at the end of every run.
    return GpuRowMemory(cuda, Stream(cuda), waits=True)
