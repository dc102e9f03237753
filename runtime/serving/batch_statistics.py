"""What a continuous batch holds and has done."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BatchStatistics"]


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """What a batch holds, and what it has done since it was made.

    Attributes:
        num_slots: sequences that it decodes together at most.
        num_active: sequences that have a slot.
        num_waiting: sequences that wait for one.
        num_steps: decode steps.
        prefill_tokens: tokens of prompts that ran.
        generated_tokens: tokens of answers.
        prefix_hits: prompts whose beginning was there already.
        prefix_tokens: tokens that those did not have to run.
        prefix_bytes: memory of sequences that have ended.
        prefix_evictions: of them that had to make room.
    """

    num_slots: int
    num_active: int
    num_waiting: int
    num_steps: int
    prefill_tokens: int
    generated_tokens: int
    prefix_hits: int
    prefix_tokens: int
    prefix_bytes: int
    prefix_evictions: int
