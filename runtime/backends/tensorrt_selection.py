"""What follows the logits of a step: a token chosen on the GPU, or the logits on the host."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlmport.runtime.device.memory import DeviceBlock, PinnedBlock
from vlmport.runtime.device.sizes import lay_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.backends.tensorrt_buffers import BatchBuffers
    from vlmport.runtime.engines.running import EngineContext, RunningEngines
    from vlmport.runtime.sampling import TokenSampler

__all__ = ["GreedySelection", "HostLogits", "SampledSelection", "Selection"]

# Numbers by which rows are sampled, as the engine names them.
_OPTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


class Selection(Protocol):
    """What a step ends with.

    Attributes:
        contexts: the engines that it runs.
    """

    contexts: Sequence[EngineContext]

    def bind(self) -> None:
        """Sets the contexts' shapes and addresses."""
        ...

    def queue_tokens(self) -> None:
        """Queues, in front of the step, what brings the tokens to be appended to the GPU."""
        ...

    def queue(self) -> None:
        """Queues, behind the step, what brings tokens or logits to the host."""
        ...


class GreedySelection:
    """Takes the most likely token of each row.

    Args:
        running: the engines.
        context: of select_greedy.
        buffers: of the batch.
    """

    def __init__(
        self,
        running: RunningEngines,
        context: EngineContext,
        buffers: BatchBuffers,
    ) -> None:
        self.contexts: Sequence[EngineContext] = (context,)
        self._running = running
        self._buffers = buffers

    def bind(self) -> None:
        """Sets shapes and addresses; see `Selection.bind`."""
        logits = self._buffers.work.fields["logits"].shape
        self.contexts[0].set_shapes({"logits": logits, "suppressed": logits[1:]})
        self.contexts[0].bind(_common_addresses(self._buffers))

    def queue_tokens(self) -> None:
        """Does nothing: the token lies where the selection before left it."""

    def queue(self) -> None:
        """Chooses; see `Selection.queue`."""
        self.contexts[0].enqueue()
        _queue_chosen(self._running, self._buffers)


class SampledSelection:
    """Chooses each row's token as its options say.

    Args:
        running: the engines.
        context: of select_sampled.
        buffers: of the batch.
    """

    def __init__(
        self,
        running: RunningEngines,
        context: EngineContext,
        buffers: BatchBuffers,
    ) -> None:
        self.contexts: Sequence[EngineContext] = (context,)
        self._running = running
        self._buffers = buffers
        batch, vocab_size = buffers.work.fields["logits"].shape
        self._options = DeviceBlock(
            running.cuda,
            {
                **dict.fromkeys(_OPTIONS, ("float32", (batch, 1))),
                "top_k": ("int64", (batch, 1)),
            },
            "sampling",
        )
        state = {"counts": ("float32", (batch, vocab_size)), "seen": ("bool", (batch, vocab_size))}
        new = {f"new_{name}": tensor for name, tensor in state.items()}
        with ExitStack() as held:
            held.callback(self._options.close)
            self._state = DeviceBlock(running.cuda, state, "penalties of sampling")
            held.callback(self._state.close)
            self._new_state = DeviceBlock(running.cuda, new, "penalties of sampling")
            held.callback(self._new_state.close)
            buffers.close_with(held.pop_all().close)

    def start(self, samplers: Sequence[TokenSampler]) -> None:
        """Queues what the rows' options are, and which tokens their prompts hold."""
        stream, transfer = self._running.stream, self._running.transfer
        fields, size = lay_out(
            {name: (field.dtype, field.shape) for name, field in self._options.fields.items()}
        )
        content = np.zeros(size, np.uint8)
        for name, field in fields.items():
            values = [[getattr(sampler.options, name)] for sampler in samplers]
            array = np.array(values, np.dtype(field.dtype))
            content[field.offset : field.offset + field.size] = array.reshape(-1).view(np.uint8)
        transfer.upload(content, "uint8", self._options.address)
        stream.clear(self._state["counts"], self._state.fields["counts"].size)
        seen = np.stack([sampler.seen for sampler in samplers])
        transfer.upload(seen, "bool", self._state["seen"])

    def bind(self) -> None:
        """Sets shapes and addresses; see `Selection.bind`."""
        logits = self._buffers.work.fields["logits"].shape
        row: tuple[int, ...] = (logits[0], 1)
        shapes = dict.fromkeys((*_OPTIONS, "top_k", "uniform"), row)
        shapes |= {"logits": logits, "suppressed": logits[1:], "counts": logits, "seen": logits}
        addresses = {name: self._options[name] for name in (*_OPTIONS, "top_k")}
        addresses |= {name: self._state[name] for name in ("counts", "seen")}
        addresses |= {name: self._new_state[name] for name in ("new_counts", "new_seen")}
        addresses["uniform"] = self._buffers.device_control["uniform"]
        self.contexts[0].set_shapes(shapes)
        self.contexts[0].bind({**addresses, **_common_addresses(self._buffers)})

    def queue_tokens(self) -> None:
        """Does nothing: the token lies where the selection before left it."""

    def queue(self) -> None:
        """Chooses, and keeps what was chosen for the next time; see `Selection.queue`."""
        self.contexts[0].enqueue()
        # Both blocks are laid out alike.
        self._running.stream.copy(self._state.address, self._new_state.address, self._state.size)
        _queue_chosen(self._running, self._buffers)


class HostLogits:
    """Brings the logits to the host, which says what tokens follow.

    Args:
        running: the engines.
        buffers: of the batch.
    """

    def __init__(self, running: RunningEngines, buffers: BatchBuffers) -> None:
        self.contexts: Sequence[EngineContext] = ()
        self._running = running
        self._buffers = buffers
        shape = buffers.work.fields["logits"].shape
        self._pinned = PinnedBlock(running.cuda, {"logits": ("float32", shape)})
        buffers.close_with(self._pinned.close)

    @property
    def logits(self) -> NDArray[np.float32]:
        """float32 [batch, vocab_size] of the last step; a copy."""
        return self._pinned["logits"].copy()

    def bind(self) -> None:
        """Does nothing: no engine runs."""

    def queue_tokens(self) -> None:
        """Brings the tokens to the GPU; see `Selection.queue_tokens`."""
        self._buffers.queue_tokens()

    def queue(self) -> None:
        """Brings the logits to the host; see `Selection.queue`."""
        work = self._buffers.work
        size = work.fields["logits"].size
        self._running.stream.copy_out(self._pinned.address, work["logits"], size)


def _common_addresses(buffers: BatchBuffers) -> dict[str, int]:
    return {
        "logits": buffers.work["logits"],
        "suppressed": buffers.work["suppressed"],
        "token_ids": buffers.device_chosen["token_ids"],
        "faulty": buffers.device_chosen["faulty"],
    }


def _queue_chosen(running: RunningEngines, buffers: BatchBuffers) -> None:
    source, target = buffers.device_chosen, buffers.chosen
    running.stream.copy_out(target.address, source.address, source.size)
