"""What a service tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.errors import CancelledError, DeadlineError, QueueFullError

if TYPE_CHECKING:
    from vlmport.runtime.serving.feature_cache import FeatureStatistics
    from vlmport.runtime.serving.worker import WorkerStatistics

__all__ = ["ServingStatistics", "statistics_of"]


@dataclass(frozen=True, slots=True)
class ServingStatistics:
    """What a service does now, and did since it was opened.

    Attributes:
        waiting: accepted requests that have no slot yet, those in preparation included.
        active: requests that have a slot.
        free_slots: slots without a request.
        finished: requests that were answered to the end.
        cancelled: requests that were taken back.
        late: requests whose time was up.
        failed: requests that ended with another error, be it that they cannot be used.
        refused: requests that were not taken, since there were too many.
        decode_steps: steps that gave each running answer a token.
        prompt_tokens: tokens of prompts that the decoder has behind it.
        reused_prompt_tokens: those of them whose keys and values were there already.
        generated_tokens: tokens of all answers.
        feature_hits: pictures whose features were there already, or were being computed.
        feature_misses: pictures whose features were computed.
        feature_bytes: memory that stored image features take.
        prefix_bytes: memory that stored keys and values take.
        prefix_evictions: stored prefixes that made room for others.
    """

    waiting: int
    active: int
    free_slots: int
    finished: int
    cancelled: int
    late: int
    failed: int
    refused: int
    decode_steps: int
    prompt_tokens: int
    reused_prompt_tokens: int
    generated_tokens: int
    feature_hits: int
    feature_misses: int
    feature_bytes: int
    prefix_bytes: int
    prefix_evictions: int


def statistics_of(worker: WorkerStatistics, features: FeatureStatistics) -> ServingStatistics:
    """Puts together what the parts of a service tell."""
    batch, ended = worker.batch, worker.ended
    told_apart = (None, CancelledError, DeadlineError, QueueFullError)
    return ServingStatistics(
        waiting=worker.waiting,
        active=batch.num_active,
        free_slots=batch.num_slots - batch.num_active,
        finished=ended[None],
        cancelled=ended[CancelledError],
        late=ended[DeadlineError],
        failed=ended.total() - sum(ended[kind] for kind in told_apart),
        refused=ended[QueueFullError],
        decode_steps=batch.num_steps,
        prompt_tokens=batch.prefill_tokens + batch.prefix_tokens,
        reused_prompt_tokens=batch.prefix_tokens,
        generated_tokens=batch.generated_tokens,
        feature_hits=features.hits,
        feature_misses=features.misses,
        feature_bytes=features.num_bytes,
        prefix_bytes=batch.prefix_bytes,
        prefix_evictions=batch.prefix_evictions,
    )
