"""Chooses tokens on the host, from logits that a backend hands out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmport.runtime.host_prompt import padded_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.backends.base import Decoding, PromptEmbeddings
    from vlmport.runtime.sampling import TokenSampler

__all__ = ["HostTokenDecoding"]


class HostTokenDecoding:
    """A `vlmport.runtime.backends.base.TokenDecoding` round a batch whose logits reach the host.

    Args:
        decoding: the batch; it is closed with this one.
        samplers: one for each row.
        suppressed: token ids that are never chosen.
        on_logits: is called with the logits float32 [batch, vocab_size] of every step; rows that
            have ended hold values without meaning, and suppressed tokens the lowest float32.
    """

    def __init__(
        self,
        decoding: Decoding,
        samplers: Sequence[TokenSampler],
        suppressed: Sequence[int],
        on_logits: Callable[[NDArray[np.float32]], None] | None = None,
    ) -> None:
        self._decoding = decoding
        self._samplers = samplers
        self._suppressed = list(suppressed)
        self._on_logits = on_logits
        self._token_ids = np.zeros(len(samplers), np.int64)

    def prefill(self, prompts: Sequence[PromptEmbeddings]) -> NDArray[np.int64]:
        """Runs the prompts and chooses each row's first token; see `TokenDecoding.prefill`."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        logits = self._decoding.prefill(padded_prompts(prompts), lengths)
        return self._chosen(logits, np.ones(len(prompts), np.bool_))

    def step(self, active: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Appends the tokens chosen last and chooses the next; see `TokenDecoding.step`."""
        return self._chosen(self._decoding.step(self._token_ids, active), active)

    def close(self) -> None:
        """Gives back what the batch holds; see `TokenDecoding.close`."""
        self._decoding.close()

    def _chosen(self, logits: NDArray[np.float32], active: NDArray[np.bool_]) -> NDArray[np.int64]:
        logits[:, self._suppressed] = np.finfo(np.float32).min
        if self._on_logits is not None:
            self._on_logits(logits)
        for index, sampler in enumerate(self._samplers):
            if active[index]:
                self._token_ids[index] = sampler.select(logits[index])
        return self._token_ids.copy()
