"""How much a service takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from vlmport.errors import InputError

__all__ = ["ServingOptions"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """Limits of a service.

    Attributes:
        num_slots: sequences that are decoded together at most.
        cache_tokens: tokens that the KV cache holds, all slots together; None for as many as
            `num_slots` sequences of the bundle's max_length take, on a CPU for no more than fits
            into half of the free memory.
        max_queue: accepted requests that wait for a slot at most; the next one is refused.
        prefill_tokens: tokens of waiting prompts that run between two decode steps at most, where
            prompts may be cut; None for as many as keep a step's time near that of the decoding
            alone.
        prefix_bytes: memory for keys and values of prompts that have ended, to be used again; 0
            for none.
        feature_bytes: memory for image features, to be used again; 0 for none.

    Raises:
        InputError: if a value is outside its range; all of them at once.
    """

    num_slots: int = 8
    cache_tokens: int | None = None
    max_queue: int = 64
    prefill_tokens: int | None = None
    prefix_bytes: int = 256 * _MIB
    feature_bytes: int = 256 * _MIB

    def __post_init__(self) -> None:
        """Checks the ranges."""
        smallest = {
            "num_slots": 1,
            "cache_tokens": 1,
            "max_queue": 0,
            "prefill_tokens": 1,
            "prefix_bytes": 0,
            "feature_bytes": 0,
        }
        faults = [
            f"{name}: found {getattr(self, name)}; expected {least} or more"
            for name, least in smallest.items()
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        if faults:
            raise InputError("; ".join(faults))
