"""Reads the regions that an answer names, in the form that the manifest says."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlmport.contract import MASK_DECODER
from vlmport.runtime.coordinate_regions import read_coordinates
from vlmport.runtime.masks import with_masks
from vlmport.runtime.regions import read_regions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from vlmport.contract import Manifest
    from vlmport.runtime.request import GenerationResult

__all__ = ["with_regions"]


def with_regions(
    result: GenerationResult,
    tokenizer: Tokenizer,
    manifest: Manifest,
    image_sizes: Sequence[tuple[int, int]],
    decode_masks: Callable[[NDArray[np.int64]], NDArray[np.float32]],
) -> GenerationResult:
    """Adds the regions that an answer names, if the bundle's answers can.

    Args:
        result: the answer.
        tokenizer: the bundle's.
        manifest: the bundle's.
        image_sizes: (height, width) in pixels of the request's pictures.
        decode_masks: runs the mask decoder; called only if there is one.
    """
    form = manifest.answers
    if form.kind == "text":
        return result
    if form.kind == "coordinate_tokens":
        reading = read_coordinates(result.token_ids, tokenizer, manifest, image_sizes)
        return replace(result, regions=reading.regions, faults=reading.faults)
    reading = read_regions(result.token_ids, tokenizer, form, image_sizes)
    regions = reading.regions
    if regions and manifest.has_graph(MASK_DECODER):
        regions = with_masks(regions, image_sizes[0], decode_masks)
    return replace(result, regions=regions, faults=reading.faults)
