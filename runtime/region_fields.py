"""Regions of an answer as fields of JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vlmport.runtime.masks import run_lengths

if TYPE_CHECKING:
    from vlmport.runtime.regions import Region

__all__ = ["region_fields"]


def region_fields(region: Region) -> dict[str, object]:
    """Label, box in pixels, codes, and the mask as lengths of its runs."""
    mask = region.mask
    return {
        "label": region.label,
        "box": dataclasses.asdict(region.box),
        "codes": region.codes,
        "mask": None if mask is None else {"size": mask.shape, "counts": run_lengths(mask)},
    }
