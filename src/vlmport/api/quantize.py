"""Turns a bundle into one of lower precision, by statistics of real inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["QuantizeOptions", "quantize"]
