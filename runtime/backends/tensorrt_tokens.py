"""A batch as the generation loop sees it: tokens, or logits for those who need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import VlmportError
from vlmport.runtime.backends.tensorrt_graphs import DeviceRows
from vlmport.runtime.backends.tensorrt_selection import (
    GreedySelection,
    HostLogits,
    SampledSelection,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.backends.base import PromptEmbeddings
    from vlmport.runtime.backends.tensorrt_decoding import BatchState, DecodeContexts
    from vlmport.runtime.engines.running import RunningEngines
    from vlmport.runtime.sampling import TokenSampler

__all__ = ["DeviceLogitDecoding", "DeviceTokenDecoding"]

_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


class DeviceTokenDecoding:
    """A batch whose tokens are chosen on the GPU; see `TokenDecoding`.

    Args:
        running: the engines.
        contexts: of decoding.
        state: empty, of as many rows.
        samplers: one for each row.
        suppressed: token ids that are never chosen.
        give_back: takes the state at the end.
    """

    def __init__(
        self,
        running: RunningEngines,
        contexts: DecodeContexts,
        state: BatchState,
        samplers: Sequence[TokenSampler],
        suppressed: Sequence[int],
        give_back: Callable[[BatchState], None],
    ) -> None:
        self._running = running
        self._state: BatchState | None = state
        self._samplers = samplers
        self._suppressed = list(suppressed)
        self._give_back = give_back
        is_greedy = all(one.is_greedy and not one.has_penalty for one in samplers)
        kind = GreedySelection if is_greedy else SampledSelection
        found = state.selection(kind)
        if found is None:
            context = contexts.greedy if is_greedy else contexts.sampled
            found = kind(running, context, state.buffers)
            state.add_selection(found)
        self._selection = found

    def prefill(self, prompts: Sequence[PromptEmbeddings]) -> NDArray[np.int64]:
        """Runs the prompts and chooses each row's first token; see `TokenDecoding.prefill`."""
        assert self._state is not None
        rows = [prompt for prompt in prompts if isinstance(prompt, DeviceRows)]
        assert len(rows) == len(prompts)  # from this backend
        active = np.ones(len(rows), np.bool_)
        with self._running.lock:
            self._state.suppress(self._suppressed)
            if isinstance(self._selection, SampledSelection):
                self._selection.start(self._samplers)
            self._state.prefill(rows, self._selection, self._drawn(active))
            return self._chosen(active)

    def step(self, active: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Appends the tokens chosen last and chooses the next; see `TokenDecoding.step`."""
        assert self._state is not None
        with self._running.lock:
            self._state.step(active, self._selection, self._drawn(active))
            return self._chosen(active)

    def close(self) -> None:
        """Gives the memory back; see `TokenDecoding.close`."""
        if self._state is not None:
            self._give_back(self._state)
            self._state = None

    def _drawn(self, active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The random numbers of the rows that choose; rounding must not make one a 1."""
        drawn = [
            sampler.draw() if choosing else 0.0
            for sampler, choosing in zip(self._samplers, active, strict=True)
        ]
        return np.minimum(np.array(drawn, np.float32), _BELOW_ONE)

    def _chosen(self, active: NDArray[np.bool_]) -> NDArray[np.int64]:
        assert self._state is not None
        chosen = self._state.buffers.chosen
        if (chosen["faulty"][:, 0] & active).any():
            rows = ", ".join(map(str, np.flatnonzero(chosen["faulty"][:, 0] & active)))
            msg = (
                f"logits: those of row {rows} hold NaN or infinity; the model's numbers "
                "overflowed; export it in a wider precision, or report the checkpoint"
            )
            raise VlmportError(msg)
        token_ids: NDArray[np.int64] = chosen["token_ids"][:, 0].copy()
        return token_ids


class DeviceLogitDecoding:
    """A batch whose logits come to the host; see `Decoding`.

    Args:
        running: the engines.
        state: empty.
        dtype: element type of the embeddings.
        give_back: takes the state at the end.
    """

    def __init__(
        self,
        running: RunningEngines,
        state: BatchState,
        dtype: str,
        give_back: Callable[[BatchState], None],
    ) -> None:
        self._running = running
        self._state: BatchState | None = state
        self._dtype = dtype
        self._give_back = give_back
        self._uniform = np.zeros(state.buffers.batch, np.float32)  # nothing is drawn here
        found = state.selection(HostLogits)
        if found is None:
            found = HostLogits(running, state.buffers)
            state.add_selection(found)
        assert isinstance(found, HostLogits)
        self._selection = found

    def prefill(
        self, inputs_embeds: NDArray[np.floating[Any]], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the prompts; see `Decoding.prefill`."""
        assert self._state is not None
        with self._running.lock:
            prompts = []
            for row, length in zip(inputs_embeds, lengths, strict=True):
                content = row[:length]
                prompt = DeviceRows(
                    self._running, len(content), content.shape[1], self._dtype, "a prompt"
                )
                self._running.transfer.upload(content, self._dtype, prompt.address())
                prompts.append(prompt)
            self._state.prefill(prompts, self._selection, self._uniform)
            return self._selection.logits

    def step(self, token_ids: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Appends one token to the active rows; see `Decoding.step`."""
        assert self._state is not None
        with self._running.lock:
            self._state.buffers.chosen["token_ids"][:, 0] = token_ids
            self._state.step(active, self._selection, self._uniform)
            return self._selection.logits

    def close(self) -> None:
        """Gives the memory back; see `TokenDecoding.close`."""
        if self._state is not None:
            self._give_back(self._state)
            self._state = None
