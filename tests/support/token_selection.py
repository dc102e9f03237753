"""Runs the graphs that choose tokens as a device would, and says what the host would choose."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from vlmport.graphs.token_selection import selection_graphs
from vlmport.runtime.sampling import SamplingOptions, TokenSampler, filtered_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["EDGE", "Selection", "could_choose", "greedy", "host_choice", "sampled", "selection"]

# Float32 sums of probabilities, and a uniform number in float32, lie this close to exact ones.
EDGE = 2e-6

_PORTS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a graph answered.

    Attributes:
        token_ids: int64 [batch].
        faulty: bool [batch].
        counts: float32 [batch, vocab_size], of the sampled form alone.
        seen: bool [batch, vocab_size], of the sampled form alone.
    """

    token_ids: NDArray[np.int64]
    faulty: NDArray[np.bool_]
    counts: NDArray[np.float32]
    seen: NDArray[np.bool_]


@functools.lru_cache(maxsize=2)
def _sessions(vocab_size: int) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return {
        name: onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for name, model in selection_graphs(vocab_size).items()
    }


def greedy(logits: NDArray[np.float32], suppressed: Sequence[int] = ()) -> Selection:
    """Runs select_greedy on logits float32 [batch, vocab_size]."""
    fed = {"logits": logits, "suppressed": _mask(suppressed, logits.shape[1])}
    token_ids, faulty = _sessions(logits.shape[1])["select_greedy"].run(None, fed)
    nothing = np.zeros(0)
    return Selection(token_ids[:, 0], faulty[:, 0], nothing.astype(np.float32), nothing > 0)


def selection(vocab_size: int, samplers: Sequence[TokenSampler]) -> Selection:
    """The state before the first token."""
    batch = len(samplers)
    counts = np.zeros((batch, vocab_size), np.float32)
    seen = np.stack([sampler.seen for sampler in samplers])
    return Selection(np.zeros(batch, np.int64), np.zeros(batch, np.bool_), counts, seen)


def sampled(
    logits: NDArray[np.float32],
    options: Sequence[SamplingOptions],
    uniforms: Sequence[float] | NDArray[np.float64],
    before: Selection | None = None,
    suppressed: Sequence[int] = (),
) -> Selection:
    """Runs select_sampled.

    Args:
        logits: float32 [batch, vocab_size].
        options: of each row.
        uniforms: of each row.
        before: the state; None for that of no prompt and no answer.
        suppressed: token ids.
    """
    fed: dict[str, NDArray[Any]] = {
        name: np.array([[getattr(row, name)] for row in options], np.float32) for name in _PORTS
    }
    fed["logits"] = logits
    fed["suppressed"] = _mask(suppressed, logits.shape[1])
    fed["top_k"] = np.array([[row.top_k] for row in options], np.int64)
    fed["uniform"] = np.array(uniforms, np.float32)[:, None]
    fed["counts"] = np.zeros(logits.shape, np.float32) if before is None else before.counts
    fed["seen"] = np.zeros(logits.shape, np.bool_) if before is None else before.seen
    outputs = _sessions(logits.shape[1])["select_sampled"].run(None, fed)
    token_ids, faulty, counts, seen = outputs
    return Selection(token_ids[:, 0], faulty[:, 0], counts, seen)


def host_choice(logits: NDArray[np.float32], options: SamplingOptions, uniform: float) -> int:
    """What `TokenSampler` takes of penalised logits float32 [vocab_size]."""

    class Fixed(TokenSampler):
        def draw(self) -> float:
            return uniform

    plain = replace(options, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
    return Fixed(plain, len(logits)).select(logits)


def could_choose(
    token: int, logits: NDArray[np.float32], options: SamplingOptions, uniform: float
) -> bool:
    """Whether `TokenSampler` takes the token if probabilities are off by `EDGE` somewhere.

    Args:
        token: what the graph chose.
        logits: float32 [vocab_size], penalised.
        options: of the row.
        uniform: of the row.
    """
    if options.temperature == 0:
        return False
    for top_p in {max(options.top_p * (1 - EDGE), 1e-12), min(options.top_p * (1 + EDGE), 1.0)}:
        for min_p in {options.min_p * (1 - EDGE), min(options.min_p * (1 + EDGE), 1.0)}:
            shifted = replace(options, top_p=top_p, min_p=min_p)
            kept, values = filtered_logits(logits, shifted)
            weights = np.exp(values.astype(np.float64) - values.max())
            ends = np.cumsum(weights) / weights.sum()
            position = int(np.searchsorted(kept, token))
            if position == len(kept) or kept[position] != token:
                continue
            start = ends[position - 1] if position else 0.0
            if start - EDGE <= uniform <= ends[position] + EDGE:
                return True
    return False


def _mask(suppressed: Sequence[int], vocab_size: int) -> NDArray[np.bool_]:
    mask = np.zeros(vocab_size, np.bool_)
    mask[list(suppressed)] = True
    return mask
