"""What a service tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ServingStatistics"]


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
        failed: accepted requests that ended with another error.
        refused: requests that were not accepted, since too many were waiting.
        prompt_tokens: tokens of the prompts of all requests that got a slot.
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
    prompt_tokens: int
    reused_prompt_tokens: int
    generated_tokens: int
    feature_hits: int
    feature_misses: int
    feature_bytes: int
    prefix_bytes: int
    prefix_evictions: int
