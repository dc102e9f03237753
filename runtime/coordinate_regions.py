"""Reads the boxes and points that an answer names by coordinate tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.contract import PatchImages
from vlmport.runtime.coordinates import answer_locations, answer_scale
from vlmport.runtime.regions import Box, Region, RegionReading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from vlmport.contract import Manifest
    from vlmport.runtime.coordinates import Location

__all__ = ["read_coordinates"]


def read_coordinates(
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    manifest: Manifest,
    image_sizes: Sequence[tuple[int, int]],
) -> RegionReading:
    """Reads an answer such as "<0x00>" "12" "30" "44" "61" "<0x01>".

    Args:
        token_ids: the answer.
        tokenizer: the bundle's.
        manifest: of a bundle whose answers are of kind "coordinate_tokens".
        image_sizes: (height, width) in pixels of the request's pictures.

    Returns:
        The regions, in pixels of the one picture, without labels; a point is a box without extent.
    """
    form, image = manifest.prompt.coordinates, manifest.image
    assert form is not None
    assert isinstance(image, PatchImages)  # the manifest reader has checked both
    most = (image.max_height, image.max_width)
    scale = answer_scale(image_sizes[0] if image_sizes else most, most)
    names = [tokenizer.id_to_token(token) or "" for token in token_ids]
    locations, faults = answer_locations(names, form, scale)
    if locations and len(image_sizes) != 1:
        fault = (
            f"answer: found boxes or points and {len(image_sizes)} pictures; expected one picture, "
            "since a coordinate does not say which it belongs to"
        )
        return RegionReading((), (fault, *faults))
    return RegionReading(tuple(map(_region, locations)), faults)


def _region(location: Location) -> Region:
    if location.kind == "box":
        return Region("", Box(*map(float, location.values)), ())
    x, y = map(float, location.values)
    return Region("", Box(y, x, y, x), ())
