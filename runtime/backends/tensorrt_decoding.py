"""The decode loop on the GPU: prompts in pieces, then steps that are captured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.contract_engines import SELECT_GREEDY, SELECT_SAMPLED
from vlmport.errors import EngineError
from vlmport.runtime.backends.tensorrt_buffers import BatchBuffers
from vlmport.runtime.backends.tensorrt_prefill import PrefillQueue, cache_addresses
from vlmport.runtime.backends.tensorrt_step import RepeatedStep
from vlmport.runtime.prompt_pieces import longest_piece, prompt_pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.tensorrt_graphs import DeviceRows
    from vlmport.runtime.backends.tensorrt_selection import Selection
    from vlmport.runtime.engines.running import RunningEngines
    from vlmport.runtime.prompt_pieces import PromptPiece

__all__ = ["BatchState", "DecodeContexts"]


class DecodeContexts:
    """The execution contexts of decoding, made once; batches take turns with them."""

    def __init__(self, running: RunningEngines) -> None:
        # Prompts are embedded in a context of their own: their lengths would spoil this one's.
        self.embed = running.context("embed_tokens", "default", captured=True)
        self.prefill = running.context("decoder", "prefill")
        self.decode = running.context("decoder", "decode", captured=True)
        self.greedy = running.context(SELECT_GREEDY, "default", captured=True)
        self.sampled = running.context(SELECT_SAMPLED, "default", captured=True)


class BatchState:
    """A number of sequences with their cache.

    Args:
        running: the engines.
        contexts: of decoding.
        manifest: the bundle's.
        batch: rows.

    Raises:
        EngineError: if the engines take fewer rows, or the memory does not suffice.
    """

    def __init__(
        self, running: RunningEngines, contexts: DecodeContexts, manifest: Manifest, batch: int
    ) -> None:
        check_batch(contexts, batch)
        self.buffers = BatchBuffers(running, manifest, batch)
        self.capacity = running.engines.options.max_length
        self._running = running
        self._contexts = contexts
        self._attention = manifest.attention
        self._prompts = PrefillQueue(running, contexts.prefill, manifest)
        self._lengths = np.zeros(batch, np.int64)  # cache rows that each sequence has filled
        self._selections: dict[type[Any], Selection] = {}
        self._steps: dict[type[Any], RepeatedStep] = {}

    def reset(self) -> None:
        """Forgets all sequences."""
        self._running.stream.synchronize()  # a batch that failed may have left work behind
        self._lengths[:] = 0
        # Rows that are not valid are multiplied by 0 where attention is decomposed: a NaN of an
        # earlier answer, or of memory that was never written, would stay one.
        self._running.stream.clear(self.buffers.cache.address, self.buffers.cache.size)

    def suppress(self, token_ids: Sequence[int]) -> None:
        """Queues which tokens are never chosen."""
        mask = np.zeros(self.buffers.work.fields["suppressed"].shape, np.bool_)
        mask[list(token_ids)] = True
        self._running.transfer.upload(mask, "bool", self.buffers.work["suppressed"])

    def selection(self, kind: type[Any]) -> Selection | None:
        """What a step of this kind ends with, if it was added."""
        return self._selections.get(kind)

    def add_selection(self, selection: Selection) -> None:
        """Adds a kind of step; it stays with the buffers."""
        contexts = (self._contexts.embed, self._contexts.decode, *selection.contexts)
        step = RepeatedStep(
            self._running,
            contexts,
            lambda: self._bind_step(selection),
            lambda: self._queue_step(selection),
        )
        self.buffers.close_with(step.close)
        self._selections[type(selection)] = selection
        self._steps[type(selection)] = step

    def prefill(
        self, prompts: Sequence[DeviceRows], selection: Selection, uniform: NDArray[np.float32]
    ) -> None:
        """Runs prompts, causal ones in pieces that the engine takes, and waits for the end.

        Args:
            prompts: one for each row.
            selection: what follows.
            uniform: float32 [batch], the rows' random numbers.

        Raises:
            EngineError: if a prompt must run in one piece and is too long for the engine.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        self._check_room(int(lengths.max()))
        longest = longest_piece(self._attention, self._contexts.prefill.largest("inputs_embeds", 1))
        for piece in prompt_pieces(lengths, self._attention.first_position, longest):
            self._queue_piece(prompts, piece)
        self._lengths[:] = lengths
        self._write_control(uniform)
        selection.bind()
        self.buffers.queue_control()
        selection.queue()
        self.buffers.wait()

    def step(
        self, active: NDArray[np.bool_], selection: Selection, uniform: NDArray[np.float32]
    ) -> None:
        """Appends a token to the active rows, and waits for the end.

        Args:
            active: bool [batch].
            selection: what follows.
            uniform: as in `prefill`.
        """
        self._lengths += active
        self._check_room(int(self._lengths.max()))
        self._write_control(uniform)
        self._steps[type(selection)].run()
        self.buffers.wait()

    def close(self) -> None:
        """Frees everything."""
        self.buffers.close()

    def _check_room(self, rows: int) -> None:
        if rows > self.capacity:
            raise EngineError(too_long(rows, self.capacity))

    def _queue_piece(self, prompts: Sequence[DeviceRows], piece: PromptPiece) -> None:
        """Queues a piece and keeps the logits of the rows that end in it."""
        cache = self.buffers.cache
        logits, row_bytes = self._prompts.queue(
            prompts, piece, {name: cache[name] for name in cache.fields}
        )
        for row in map(int, np.flatnonzero(piece.ends_here)):
            target = self.buffers.work["logits"] + row * row_bytes
            self._running.stream.copy(target, logits + row * row_bytes, row_bytes)

    def _bind_step(self, selection: Selection) -> None:
        buffers, batch = self.buffers, self.buffers.batch
        embed, decode = self._contexts.embed, self._contexts.decode
        embeds = buffers.work["inputs_embeds"]
        embed.set_shapes({"input_ids": (batch, 1)})
        embed.bind({"input_ids": buffers.device_chosen["token_ids"], "inputs_embeds": embeds})
        shapes = {name: field.shape for name, field in buffers.cache.fields.items()}
        shapes |= {name: field.shape for name, field in buffers.device_control.fields.items()}
        shapes["inputs_embeds"] = buffers.work.fields["inputs_embeds"].shape
        decode.set_shapes(shapes)
        cache = {name: buffers.cache[name] for name in buffers.cache.fields}
        addresses = cache_addresses(decode, cache)
        addresses |= {name: buffers.device_control[name] for name in buffers.device_control.fields}
        addresses |= {"inputs_embeds": embeds, "logits": buffers.work["logits"]}
        decode.bind(addresses)
        selection.bind()

    def _queue_step(self, selection: Selection) -> None:
        self.buffers.queue_control()
        selection.queue_tokens()
        self._contexts.embed.enqueue()
        self._contexts.decode.enqueue()
        selection.queue()

    def _write_control(self, uniform: NDArray[np.float32]) -> None:
        control = self.buffers.control
        # A row that has ended overwrites its last cache row, which nobody reads any more.
        control["write_indices"][:] = self._lengths - 1
        control["position_ids"][:, 0] = self._lengths - 1 + self._attention.first_position
        control["valid_lengths"][:] = self._lengths
        control["uniform"][:, 0] = uniform


def check_batch(contexts: DecodeContexts, batch: int) -> None:
    """Checks that the engines take so many rows.

    Raises:
        EngineError: if they do not.
    """
    largest = contexts.decode.largest("inputs_embeds", 0)
    if batch > largest:
        msg = (
            f"decoder: found a batch of {batch}; its engine takes 1 to {largest} rows; ask for "
            f"fewer together, or build the engines again with `vlmport build --max-batch {batch}`"
        )
        raise EngineError(msg)


def too_long(tokens: int, capacity: int) -> str:
    """The message of a sequence that the engines' cache does not hold."""
    return (
        f"decoder: found {tokens} tokens of prompt and answer; the cache of its engine holds "
        f"{capacity} (max_length); ask for fewer new tokens, shorten the prompt, or build the "
        f"engines again with `vlmport build --max-length {tokens}`"
    )
