"""What a batch of sequences keeps on the GPU: its cache, and what goes in and out of a step."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vlmport.runtime.device.cuda import Event
from vlmport.runtime.device.memory import DeviceBlock, PinnedBlock

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.contract import Manifest
    from vlmport.runtime.engines.running import RunningEngines

__all__ = ["BatchBuffers"]


class BatchBuffers:
    """Memory for a number of rows; nothing in it is allocated again while they are decoded.

    Args:
        running: the engines.
        manifest: the bundle's.
        batch: rows.

    Attributes:
        control: what the host says at every step, in pinned memory.
        device_control: the same on the GPU.
        chosen: token_ids and faulty, in pinned memory.
        device_chosen: the same on the GPU. The tokens lie where the embedding reads them.
        work: inputs_embeds and logits of a step; suppressed, which tokens are never chosen.
        cache: keys and values, by the names of the decoder's inputs.
        reached: marks the end of a step.
    """

    def __init__(self, running: RunningEngines, manifest: Manifest, batch: int) -> None:
        self.batch = batch
        self._running = running
        cuda, capacity = running.cuda, running.engines.options.max_length
        hidden_size, vocab_size = manifest.dimensions.hidden_size, manifest.dimensions.vocab_size
        decoder, layout = manifest.graph("decoder"), manifest.kv_layout
        control = {
            "position_ids": ("int64", (batch, 1)),
            "write_indices": ("int64", (batch,)),
            "valid_lengths": ("int64", (batch,)),
            "uniform": ("float32", (batch, 1)),
        }
        chosen = {"token_ids": ("int64", (batch, 1)), "faulty": ("bool", (batch, 1))}
        work = {
            "inputs_embeds": (decoder.inputs[0].dtype, (batch, 1, hidden_size)),
            "logits": ("float32", (batch, vocab_size)),
            "suppressed": ("bool", (vocab_size,)),
        }
        rows = (batch, layout.num_kv_heads, capacity, layout.head_dim)
        cache = dict.fromkeys(manifest.past_ports, (layout.dtype, rows))
        with ExitStack() as held:  # what is there is freed if the rest does not fit
            self.cache = DeviceBlock(
                cuda, cache, f"the cache of {batch} x {capacity} tokens (batch x max_length)"
            )
            held.callback(self.cache.close)
            self.work = DeviceBlock(cuda, work, "a decode step")
            held.callback(self.work.close)
            self.device_control = DeviceBlock(cuda, control, "a decode step")
            held.callback(self.device_control.close)
            self.device_chosen = DeviceBlock(cuda, chosen, "a decode step")
            held.callback(self.device_chosen.close)
            self.control = PinnedBlock(cuda, control)
            held.callback(self.control.close)
            self.chosen = PinnedBlock(cuda, chosen)
            held.callback(self.chosen.close)
            self.reached = Event(cuda)
            held.callback(self.reached.close)
            self._held = held.pop_all()

    def queue_control(self) -> None:
        """Queues the way of `control` to the GPU."""
        source, target = self.control, self.device_control
        self._running.stream.copy_in(target.address, source.address, target.size)

    def queue_tokens(self) -> None:
        """Queues the way of the tokens that the host has chosen to the GPU."""
        source, target = self.chosen, self.device_chosen
        size = target.fields["token_ids"].size
        self._running.stream.copy_in(target["token_ids"], source.address_of("token_ids"), size)

    def wait(self) -> None:
        """Waits for all that is queued."""
        self.reached.record(self._running.stream)
        started = time.perf_counter()
        self.reached.synchronize()
        self._running.waited_seconds += time.perf_counter() - started

    def close_with(self, close: Callable[[], None]) -> None:
        """Calls something more when the buffers are freed, before they are."""
        self._held.callback(close)

    def close(self) -> None:
        """Frees everything."""
        self._held.close()
