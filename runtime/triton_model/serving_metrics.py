"""What a service tells about itself, as metrics of Triton."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vlmport.runtime.serving.statistics import ServingStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ServingMetrics"]

_PREFIX = "vlmport"
# Field of the statistics -> (name, what it is). Gauges go up and down, counters only grow.
_GAUGES = {
    "waiting": ("waiting_requests", "Accepted requests that have no slot yet"),
    "active": ("active_requests", "Requests that have a slot"),
    "free_slots": ("free_slots", "Slots without a request"),
    "feature_bytes": ("feature_cache_bytes", "Memory of stored image features"),
    "prefix_bytes": ("prefix_cache_bytes", "Memory of stored keys and values"),
}
_COUNTERS = {
    "finished": ("finished_requests", "Requests that were answered to the end"),
    "cancelled": ("cancelled_requests", "Requests that were taken back"),
    "late": ("late_requests", "Requests whose time was up"),
    "failed": ("failed_requests", "Requests that ended with another error"),
    "refused": ("refused_requests", "Requests that were not taken, since there were too many"),
    "decode_steps": ("decode_steps", "Steps that gave each running answer a token"),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts that the decoder has behind it"),
    "reused_prompt_tokens": ("reused_prompt_tokens", "Prompt tokens that were in the cache"),
    "generated_tokens": ("generated_tokens", "Tokens of all answers"),
    "feature_hits": ("feature_cache_hits", "Pictures whose features were in the cache"),
    "feature_misses": ("feature_cache_misses", "Pictures whose features were computed"),
    "prefix_evictions": ("prefix_cache_evictions", "Stored prefixes that made room for others"),
}


class ServingMetrics:
    """Families of metrics with the values of one model.

    Args:
        backend: the module of Triton's Python backend.
        labels: tell the models of a server apart.
    """

    def __init__(self, backend: Any, labels: Mapping[str, str]) -> None:
        kinds = backend.MetricFamily
        self._families = {
            field: kinds(
                name=f"{_PREFIX}_{name}",
                description=description,
                kind=kinds.GAUGE if field in _GAUGES else kinds.COUNTER,
            )
            for field, (name, description) in {**_GAUGES, **_COUNTERS}.items()
        }
        self._metrics = {
            field: family.Metric(labels=dict(labels)) for field, family in self._families.items()
        }
        self._told: dict[str, int] = {}

    def update(self, statistics: ServingStatistics) -> None:
        """Tells Triton what has changed; each change takes it some 20 microseconds."""
        for field, value in dataclasses.asdict(statistics).items():
            told = self._told.get(field, 0)
            if value == told:
                continue
            metric = self._metrics[field]
            if field in _GAUGES:
                metric.set(value)
            else:
                metric.increment(value - told)
            self._told[field] = value

    def close(self) -> None:
        """Takes the metrics away while the server listens.

        A stub whose metrics outlive the model crashes at its own end (Triton 2.51).
        """
        self._metrics.clear()
        self._families.clear()
