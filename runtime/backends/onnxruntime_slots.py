"""Sequences that join and leave, on the CPU: slots of one cache that is bound in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import InputError
from vlmport.runtime.backends.onnxruntime_memory import host_value
from vlmport.runtime.prompt_pieces import longest_piece, prompt_pieces
from vlmport.runtime.slot_arena import HostStoredTokens, SlotArena, slot_capacity
from vlmport.runtime.slot_lengths import SlotLengths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import PromptEmbeddings, StoredTokens

__all__ = ["OnnxRuntimeSlots"]


class OnnxRuntimeSlots:
    """A `vlmport.runtime.backends.base.SlotDecoding` on the CPU.

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
        self._embed = embed
        self._decoder = decoder
        self._manifest = manifest
        self._cache_tokens = cache_tokens
        self._longest_piece = longest_piece(manifest.attention)
        self._first_position = manifest.attention.first_position
        max_length = manifest.dimensions.max_length
        self._lengths = SlotLengths(num_slots, max_length, manifest.attention)
        self._arena = SlotArena(manifest.kv_layout, cache_tokens)
        self._logits = np.empty((num_slots, manifest.dimensions.vocab_size), np.float32)
        # Arrays that a decode step's bindings point into.
        dtype = manifest.graph("decoder").inputs[0].dtype
        self._token_ids = np.zeros((num_slots, 1), np.int64)
        self._embeds = np.empty((num_slots, 1, manifest.dimensions.hidden_size), dtype)
        self._positions = np.zeros((num_slots, 1), np.int64)
        self._write_indices = np.zeros(num_slots, np.int64)
        self._valid_lengths = np.zeros(num_slots, np.int64)
        self._embed_binding = embed.io_binding()
        self._step = _BoundRows(decoder, manifest)
        self._prefill = _BoundRows(decoder, manifest)

    @property
    def num_slots(self) -> int:
        """Sequences that the cache holds at most; see `SlotDecoding.num_slots`."""
        return len(self._lengths)

    @property
    def token_bytes(self) -> int:
        """Cache bytes of one token; see `SlotDecoding.token_bytes`."""
        layout = self._manifest.kv_layout
        return layout.bytes_per_token(np.dtype(layout.dtype).itemsize)

    def fits(self, num_slots: int, longest: int) -> bool:
        """Whether slots may grow so far; see `SlotDecoding.fits`."""
        return (
            0 <= num_slots <= self.num_slots
            and longest <= self._lengths.max_length
            and num_slots * longest <= self._cache_tokens
        )

    def prefill(
        self, slot: int, prompt: PromptEmbeddings, start: int, stop: int
    ) -> NDArray[np.float32]:
        """Runs a piece of a prompt, cut further if it is long; see `SlotDecoding.prefill`."""
        self._lengths.check_piece(slot, len(prompt), start, stop)
        # Room for the whole prompt at once, so that its next pieces do not move the other rows.
        self._begin(slot, start, len(prompt))
        self._prefill.bind_cache(self._arena, slot, slot + 1)
        rows, logits = prompt.numpy(), self._logits[slot : slot + 1]
        lengths = np.array([stop], np.int64)
        for piece in prompt_pieces(lengths, self._first_position, self._longest_piece, start):
            embeds = np.ascontiguousarray(rows[None, piece.start : piece.stop])
            self._prefill.bind({"inputs_embeds": embeds, **piece.inputs()}, logits)
            self._prefill.run()
        self._lengths.put(slot, stop, len(prompt))
        return logits[0]

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token to each of the first slots; see `SlotDecoding.step`."""
        count = len(token_ids)
        self._lengths.check_step(count)
        filled = self._lengths.filled[:count].copy()
        reserved = self._lengths.reserved.copy()
        reserved[:count] = np.maximum(reserved[:count], filled + 1)
        self._make_room(reserved)
        self._token_ids[:count, 0] = token_ids
        self._write_indices[:count] = filled
        self._positions[:count, 0] = filled + self._first_position
        self._valid_lengths[:count] = filled + 1
        if self._step.bind_cache(self._arena, 0, count):
            self._bind_step(count)
        self._embed.run_with_iobinding(self._embed_binding)
        self._step.run()
        self._lengths.filled[:count] = filled + 1
        self._lengths.reserved[:] = reserved
        return self._logits[:count]

    def move(self, source: int, target: int) -> None:
        """Gives a sequence another slot; see `SlotDecoding.move`."""
        self._lengths.check_slot(source)
        if source != target:
            filled = int(self._lengths.filled[source])
            self._begin(target, 0, int(self._lengths.reserved[source]))
            self._arena.copy(source, target, filled)
            self._lengths.move(source, target)

    def copy(self, source: int, target: int, length: int) -> None:
        """Begins a sequence with tokens of another; see `SlotDecoding.copy`."""
        self._lengths.check_length(source, length)
        if source != target:
            self._begin(target, 0, length)
            self._arena.copy(source, target, length)
        self._lengths.put(target, length)

    def save(self, slot: int, length: int) -> HostStoredTokens:
        """Copies tokens out of the cache; see `SlotDecoding.save`."""
        self._lengths.check_length(slot, length)
        return self._arena.save(slot, length)

    def load(self, slot: int, stored: StoredTokens, length: int) -> None:
        """Begins a sequence with stored tokens; see `SlotDecoding.load`."""
        assert isinstance(stored, HostStoredTokens)  # from a backend of this kind
        assert 0 < length <= len(stored), (length, len(stored))
        self._begin(slot, 0, length)
        self._arena.load(slot, stored, length)
        self._lengths.put(slot, length)

    def release(self, slot: int, *, is_faulty: bool = False) -> None:
        """Empties a slot; see `SlotDecoding.release`."""
        self._lengths.check_slot(slot)
        if is_faulty and self._lengths.reserved[slot]:
            self._arena.clear(slot)
        self._lengths.put(slot, 0)

    def close(self) -> None:
        """Gives back the cache; see `SlotDecoding.close`."""
        self._step.clear()
        self._prefill.clear()
        self._arena.close()

    def _begin(self, slot: int, kept: int, length: int) -> None:
        """Makes room in a slot and forgets what it holds behind its first tokens."""
        self._lengths.check_slot(slot)
        reserved = self._lengths.reserved.copy()
        reserved[slot] = length
        self._make_room(reserved)
        self._lengths.put(slot, kept, length)

    def _make_room(self, reserved: NDArray[np.int64]) -> None:
        """Lays the cache out for sequences of so many tokens.

        Raises:
            InputError: if they do not fit; nothing has changed then.
        """
        longest = int(reserved.max())
        used = int(np.flatnonzero(reserved)[-1]) + 1
        self._lengths.check_room(longest)
        if not self.fits(used, longest):
            msg = (
                f"cache: found {used} sequences of up to {longest} tokens; it holds "
                f"{self._cache_tokens} (cache_tokens), which are {self._cache_tokens // used} for "
                "each; ask for fewer sequences at once, or for a larger cache"
            )
            raise InputError(msg)
        limit = min(self._lengths.max_length, self._cache_tokens // used)
        wanted, capacity = min(slot_capacity(longest), limit), self._arena.capacity
        # Shrinking copies what one or two decode steps read; it is put off while it saves little.
        if capacity < wanted or 4 * wanted <= 3 * capacity or used * capacity > self._cache_tokens:
            self._arena.lay_out(wanted, np.minimum(self._lengths.filled, reserved))

    def _bind_step(self, count: int) -> None:
        inputs = {
            "inputs_embeds": self._embeds[:count],
            "position_ids": self._positions[:count],
            "write_indices": self._write_indices[:count],
            "valid_lengths": self._valid_lengths[:count],
        }
        self._step.bind(inputs, self._logits[:count])
        token_ids, embeds = self._token_ids[:count], self._embeds[:count]
        self._embed_binding.bind_ortvalue_input("input_ids", host_value(token_ids))
        self._embed_binding.bind_ortvalue_output("inputs_embeds", host_value(embeds))


class _BoundRows:
    """The decoder, bound to some rows of the cache until those or their places change."""

    def __init__(self, decoder: Any, manifest: Manifest) -> None:
        self._decoder = decoder
        self._binding = decoder.io_binding()
        self._ports = tuple(zip(manifest.past_ports, manifest.present_ports, strict=True))
        self._bound: tuple[int, int, int] | None = None

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
        self._bound = None
