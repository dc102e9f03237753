"""Reads the regions of the picture that an answer names by tokens of their own.

Tokens are read by their ids: some tokenizers leave location tokens out of decoded text, and a model
that spells "<loc0001>" letter by letter has named no location.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from vlmport.contract import LocationTokenAnswers

__all__ = ["Box", "Region", "RegionReading", "read_regions"]

_MARK = re.compile(r"<(loc\d{4}|seg\d{3})>")
_SEPARATOR = ";"
_SIDES = 4


@dataclass(frozen=True, slots=True)
class Box:
    """Edges in pixels of the user's picture, upright as its EXIF orientation says.

    Attributes:
        y_min: upper edge.
        x_min: left edge.
        y_max: lower edge.
        x_max: right edge.
    """

    y_min: float
    x_min: float
    y_max: float
    x_max: float


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the picture that an answer names.

    Attributes:
        label: what the answer calls it; may be empty.
        box: where it is.
        codes: the segment codes that describe its mask; none if the answer gives a box alone.
        mask: bool [height, width] of the whole picture; None without codes or a mask decoder.
    """

    label: str
    box: Box
    codes: tuple[int, ...]
    mask: NDArray[np.bool_] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class RegionReading:
    """What could be read of an answer, and what could not.

    Attributes:
        regions: in the answer's order.
        faults: one line for each part that names a region wrongly; nothing of it is guessed.
    """

    regions: tuple[Region, ...]
    faults: tuple[str, ...]


@dataclass(slots=True)
class _Entry:
    """Marks ("loc0123", "seg045") that follow each other, and the text after them."""

    marks: list[str] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)


def read_regions(
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    form: LocationTokenAnswers,
    image_sizes: Sequence[tuple[int, int]],
) -> RegionReading:
    """Reads an answer such as "<loc0100><loc0200><loc0300><loc0400> cat ; ...".

    Args:
        token_ids: the answer.
        tokenizer: the bundle's.
        form: from the manifest.
        image_sizes: (height, width) in pixels of the request's pictures.

    Returns:
        The regions, in pixels of the one picture. An answer without location and segment tokens
        has neither regions nor faults.
    """
    entries = list(_entries(token_ids, tokenizer))
    if not any(entry.marks for entry in entries):
        return RegionReading((), ())
    if len(image_sizes) != 1:
        fault = (
            f"answer: found locations and {len(image_sizes)} pictures; expected one picture, since "
            "a location does not say which it belongs to"
        )
        return RegionReading((), (fault,))
    regions: list[Region] = []
    faults: list[str] = []
    number = 0
    for entry in entries:
        text = tokenizer.decode(entry.text_ids, skip_special_tokens=True)
        label, *others = (part.strip() for part in text.split(_SEPARATOR))
        if entry.marks:
            number += 1
            subject = f"answer, region {number} ({label!r})"
            found = _region(label, entry.marks, form, image_sizes[0])
            regions += [] if isinstance(found, str) else [found]
            faults += [f"{subject}: {found}"] if isinstance(found, str) else []
        else:
            others = [label, *others]
        faults += [
            f"answer: found {other!r} without location tokens; expected {_SIDES} in front of it"
            for other in others
            if other
        ]
    return RegionReading(tuple(regions), tuple(faults))


def _entries(token_ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[_Entry]:
    """Text before the first mark, then one entry for each run of marks."""
    entry = _Entry()
    for token_id in token_ids:
        match = _MARK.fullmatch(tokenizer.id_to_token(token_id) or "")
        if match is None:
            entry.text_ids.append(token_id)
            continue
        mark = match.group(1)
        is_blank = not tokenizer.decode(entry.text_ids, skip_special_tokens=True).strip()
        # Blanks may stand between a box and its mask, and nowhere else inside a region.
        goes_on = not entry.text_ids or (
            is_blank and mark.startswith("seg") and _count(entry.marks, "loc") == len(entry.marks)
        )
        if not goes_on:
            yield entry
            entry = _Entry()
        entry.text_ids.clear()
        entry.marks.append(mark)
    yield entry


def _region(
    label: str, marks: Sequence[str], form: LocationTokenAnswers, size: tuple[int, int]
) -> Region | str:
    """The region that some marks stand for, or what is wrong with them."""
    locations, codes = _count(marks, "loc"), _count(marks, "seg")
    in_order = all(mark.startswith("loc") for mark in marks[:locations])
    if locations != _SIDES or codes not in (0, form.codes_per_mask) or not in_order:
        order = "" if in_order else ", mixed"
        return (
            f"found {locations} location tokens and {codes} segment tokens{order}; expected "
            f"{_SIDES} location tokens, then no or {form.codes_per_mask} segment tokens"
        )
    numbers = [int(mark[3:]) for mark in marks]
    limits = [form.locations] * locations + [form.segment_codes] * codes
    beyond = [m for m, n, limit in zip(marks, numbers, limits, strict=True) if n >= limit]
    if beyond:
        return (
            f"found {', '.join(beyond)}; expected locations below {form.locations} and segment "
            f"codes below {form.segment_codes}"
        )
    y_min, x_min, y_max, x_max = numbers[:_SIDES]
    if y_max <= y_min or x_max <= x_min:
        return (
            f"found a box from y {y_min} to {y_max} and x {x_min} to {x_max}; expected each to end "
            "beyond its beginning"
        )
    height, width = (side / form.locations for side in size)
    box = Box(y_min * height, x_min * width, y_max * height, x_max * width)
    return Region(label, box, tuple(numbers[_SIDES:]))


def _count(marks: Sequence[str], kind: str) -> int:
    return sum(mark.startswith(kind) for mark in marks)
