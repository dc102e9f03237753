"""Sequences that join and leave, on the CPU: slots of one cache that is bound in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.backends.onnxruntime_memory import host_value
from vlmport.runtime.backends.slots import CacheSlots, SlotLimits
from vlmport.runtime.prompt_pieces import longest_piece
from vlmport.runtime.slot_arena import SlotArena

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import PromptEmbeddings
    from vlmport.runtime.prompt_pieces import PromptPiece

__all__ = ["OnnxRuntimeSlots"]


class OnnxRuntimeSlots(CacheSlots):
    """Slots whose capacity follows the longest sequence.

    A decode step binds the first rows of the cache alone, and a prompt binds its own row, so that
    neither pays for the others.

    Args:
        embed: session of the graph embed_tokens.
        decoder: session of the graph decoder.
        manifest: the bundle's.
        num_slots: sequences at most.
        cache_tokens: tokens of all of them together.

    Raises:
        InputError: if there is not so much memory.
    """

    def __init__(
        self,
        embed: Any,  # onnxruntime ships no types
        decoder: Any,
        manifest: Manifest,
        num_slots: int,
        cache_tokens: int,
    ) -> None:
        layout = manifest.kv_layout
        limits = SlotLimits(
            num_slots,
            manifest.dimensions.max_length,
            cache_tokens,
            layout.bytes_per_token(np.dtype(layout.dtype).itemsize),
            longest_piece(manifest.attention),
        )
        self._arena = SlotArena(layout, cache_tokens, limits.max_length)
        super().__init__(manifest, limits, self._arena)
        self._embed = embed
        self._logits = np.empty((num_slots, manifest.dimensions.vocab_size), np.float32)
        # Arrays that a decode step's bindings point into.
        dtype = manifest.graph("decoder").inputs[0].dtype
        self._token_ids = np.zeros((num_slots, 1), np.int64)
        self._step_inputs: dict[str, NDArray[Any]] = {
            "inputs_embeds": np.empty((num_slots, 1, manifest.dimensions.hidden_size), dtype),
            "position_ids": np.zeros((num_slots, 1), np.int64),
            "write_indices": np.zeros(num_slots, np.int64),
            "valid_lengths": np.zeros(num_slots, np.int64),
        }
        self._embed_binding = embed.io_binding()
        self._decoded_rows = _BoundRows(decoder, manifest)
        self._prompt_row = _BoundRows(decoder, manifest)

    def close(self) -> None:
        """Frees the cache; see `SlotDecoding.close`."""
        self._decoded_rows.clear()
        self._prompt_row.clear()
        self._arena.close()

    def _run_prompt(
        self, slot: int, prompt: PromptEmbeddings, pieces: Iterable[PromptPiece]
    ) -> NDArray[np.float32]:
        self._prompt_row.bind_cache(self._arena, slot, slot + 1)
        rows, logits = prompt.numpy(), self._logits[slot : slot + 1]
        for piece in pieces:
            embeds = np.ascontiguousarray(rows[None, piece.start : piece.stop])
            self._prompt_row.bind({"inputs_embeds": embeds, **piece.inputs()}, logits)
            self._prompt_row.run()
        chosen: NDArray[np.float32] = logits[0]
        return chosen

    def _run_step(
        self, token_ids: NDArray[np.int64], filled: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        count = len(token_ids)
        if self._decoded_rows.bind_cache(self._arena, 0, count):
            self._bind_step(count)
        self._token_ids[:count, 0] = token_ids
        self._step_inputs["position_ids"][:count, 0] = filled + self._first_position
        self._step_inputs["write_indices"][:count] = filled
        self._step_inputs["valid_lengths"][:count] = filled + 1
        self._embed.run_with_iobinding(self._embed_binding)
        self._decoded_rows.run()
        return self._logits[:count]

    def _bind_step(self, count: int) -> None:
        inputs = {name: array[:count] for name, array in self._step_inputs.items()}
        self._decoded_rows.bind(inputs, self._logits[:count])
        binding, embeds = self._embed_binding, inputs["inputs_embeds"]
        binding.bind_ortvalue_input("input_ids", host_value(self._token_ids[:count]))
        binding.bind_ortvalue_output("inputs_embeds", host_value(embeds))


class _BoundRows:
    """The decoder, bound to some rows of the cache until those or their places change."""

    def __init__(self, decoder: Any, manifest: Manifest) -> None:
        self._decoder = decoder
        self._binding = decoder.io_binding()
        self._ports = tuple(zip(manifest.past_ports, manifest.present_ports, strict=True))
        self._bound = (0, 0, 0)

    def bind_cache(self, arena: SlotArena, start: int, stop: int) -> bool:
        """Binds rows, in place; returns whether others were bound before."""
        rows = (start, stop, arena.capacity)
        if self._bound == rows:
            return False
        for (past, present), array in zip(self._ports, arena.rows(start, stop), strict=True):
            value = host_value(array)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._bound = rows
        return True

    def bind(self, inputs: Mapping[str, NDArray[Any]], logits: NDArray[np.float32]) -> None:
        """Binds what is no cache; the caller keeps the arrays alive."""
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, host_value(array))
        self._binding.bind_ortvalue_output("logits", host_value(logits))

    def run(self) -> None:
        """Runs the decoder."""
        self._decoder.run_with_iobinding(self._binding)

    def clear(self) -> None:
        """Lets the cache go."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
