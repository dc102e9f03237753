"""Queues prompts, piece by piece, into the rows of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmport.runtime.device.sizes import lay_out, size_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.tensorrt_graphs import DeviceRows
    from vlmport.runtime.engines.running import EngineContext, RunningEngines
    from vlmport.runtime.prompt_pieces import PromptPiece

__all__ = ["PrefillQueue", "cache_addresses"]


class PrefillQueue:
    """Runs pieces of prompts, in the order in which they are queued.

    Args:
        running: the engines.
        context: of the decoder, in its profile for prompts.
        manifest: the bundle's.
    """

    def __init__(self, running: RunningEngines, context: EngineContext, manifest: Manifest) -> None:
        self._running = running
        self._context = context
        self._manifest = manifest

    def queue(
        self, prompts: Sequence[DeviceRows], piece: PromptPiece, cache: Mapping[str, int]
    ) -> tuple[int, int]:
        """Queues a piece of the prompts; rows differ in length.

        Args:
            prompts: one for each row.
            piece: of them.
            cache: where keys and values of the rows lie, by the names of the decoder's inputs.

        Returns:
            Where the logits float32 [batch, vocab_size] will be until the next piece, and the
            bytes of a row of them.
        """
        batch, tokens = piece.position_ids.shape
        dimensions, layout = self._manifest.dimensions, self._manifest.kv_layout
        capacity = self._running.engines.options.max_length
        rows = (batch, layout.num_kv_heads, capacity, layout.head_dim)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(cache, rows)
        shapes |= {name: array.shape for name, array in piece.inputs().items()}
        shapes["inputs_embeds"] = (batch, tokens, dimensions.hidden_size)
        self._context.set_shapes(shapes)
        row_bytes = size_of("float32", (dimensions.vocab_size,))
        logits = self._running.workspace.address("prefill logits", batch * row_bytes)
        addresses = {
            **cache_addresses(self._context, cache),
            **self._upload_control(piece),
            "inputs_embeds": self._queue_embeds(prompts, piece.start, piece.stop),
            "logits": logits,
        }
        self._context.bind(addresses)
        self._context.enqueue()
        return logits, row_bytes

    def _queue_embeds(self, prompts: Sequence[DeviceRows], start: int, stop: int) -> int:
        """Puts the rows' embeddings below each other, zeros behind the shorter ones."""
        row_bytes = prompts[0].row_bytes
        size = len(prompts) * (stop - start) * row_bytes
        address = self._running.workspace.address("prompts in pieces", size)
        if any(len(prompt) < stop for prompt in prompts):
            self._running.stream.clear(address, size)
        for row, prompt in enumerate(prompts):
            tokens = min(len(prompt), stop) - start
            if tokens > 0:
                target = address + row * (stop - start) * row_bytes
                self._running.stream.copy(target, prompt.address(start), tokens * row_bytes)
        return address

    def _upload_control(self, piece: PromptPiece) -> dict[str, int]:
        arrays = piece.inputs()
        fields, size = lay_out({name: ("int64", array.shape) for name, array in arrays.items()})
        content = np.zeros(size, np.uint8)
        for name, field in fields.items():
            part = arrays[name].reshape(-1).view(np.uint8)
            content[field.offset : field.offset + field.size] = part
        address = self._running.workspace.address("positions of a prompt", size)
        self._running.transfer.upload(content, "uint8", address)
        return {name: address + field.offset for name, field in fields.items()}


def cache_addresses(decoder: EngineContext, cache: Mapping[str, int]) -> dict[str, int]:
    """Where keys and values lie: an output is written over its input.

    Args:
        decoder: a context of the decoder.
        cache: addresses by the names of the decoder's inputs.
    """
    aliases = {port.name: port.aliases for port in decoder.engine.outputs if port.aliases}
    return {**cache, **{name: cache[aliased] for name, aliased in aliases.items()}}
