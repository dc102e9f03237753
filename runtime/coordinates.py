"""Boxes and points: from text in pixels to tokens of a prompt, and from an answer's tokens back.

A model that was trained with coordinate tokens sees half of a row or column of the resized picture;
users write and read pixels of their own picture.

Source: transformers' processor of the models with such tokens (it defines
post_process_box_coordinates), whose arithmetic is kept to the last bit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlmport.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.contract import CoordinateTokens

__all__ = ["Location", "answer_locations", "answer_scale", "split_locations"]

_TAGS = ("<box>", "</box>", "<point>", "</point>")
# transformers makes int32 of a coordinate; none of a picture comes near.
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Location:
    """A box or a point.

    Attributes:
        kind: which of the two.
        values: top, left, bottom, right of a box; x, y of a point.
    """

    kind: Literal["box", "point"]
    values: tuple[int, ...]

    def text(self) -> str:
        """The form that prompts have: "<box>y1, x1, y2, x2</box>" or "<point>x, y</point>"."""
        return f"<{self.kind}>{', '.join(map(str, self.values))}</{self.kind}>"


def split_locations(text: str, tokens: CoordinateTokens, scale: float) -> list[str | Location]:
    """Cuts a prompt at its boxes and points, and scales these into the resized picture.

    A location may be written with tags ("<box>") or with the model's own tokens. As in transformers
    its kind follows from the number of its coordinates, and one that is not closed counts too.

    Args:
        text: of a prompt with an image.
        tokens: the model's.
        scale: height of the resized picture over that of the user's.

    Returns:
        Text and locations in their order, the latter in coordinates of tokens; no empty text.

    Raises:
        InputError: if a location is not two or four numbers in the range of a picture.
    """
    names = (tokens.box_open, tokens.box_close, tokens.point_open, tokens.point_close)
    for tag, name in zip((_TAGS[2], _TAGS[3], *_TAGS[:2]), (*names[2:], *names[:2]), strict=True):
        text = text.replace(tag, name)
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    found: list[str | Location] = []
    for index in range(0, len(pieces), 2):  # names stand at the odd places
        if not pieces[index]:
            continue
        is_location = index > 1 and pieces[index - 1] in (tokens.box_open, tokens.point_open)
        found.append(_scaled(pieces[index], scale) if is_location else pieces[index])
    return found


def answer_scale(size: tuple[int, int], most: tuple[int, int]) -> np.float32:
    """The factor by which an answer's coordinates were shrunk.

    Not quite `ImageLayout.scale`, which is of whole pixels: transformers' own two differ too.

    Args:
        size: (height, width) of the user's picture.
        most: (height, width) that pictures are shrunk to fit.

    Source: scale_factor_to_fit in post_process_box_coordinates. Its sizes are tensors, and torch
    divides a number by a tensor as float32 reciprocal times number.
    """
    if size[0] <= most[0] and size[1] <= most[1]:
        return np.float32(1)
    factors = (_divided(length, np.float32(side)) for length, side in zip(most, size, strict=True))
    return min(factors)


def answer_locations(
    answer: Sequence[str], tokens: CoordinateTokens, scale: np.float32
) -> tuple[tuple[Location, ...], tuple[str, ...]]:
    """Finds the boxes and points of an answer.

    Args:
        answer: its tokens as the vocabulary has them.
        tokens: the model's.
        scale: as `answer_scale` gives it.

    Returns:
        Locations in pixels of the user's picture, in their order, and a line for each that is
        malformed (on which transformers would loop for ever).

    Source: post_process_box_coordinates.
    """
    kinds: dict[str, tuple[Literal["box", "point"], str, int]] = {
        tokens.box_open: ("box", tokens.box_close, 4),
        tokens.point_open: ("point", tokens.point_close, 2),
    }
    found: list[Location] = []
    faults: list[str] = []
    index = 0
    while index < len(answer):
        token = answer[index]
        if token in kinds:
            kind, close, count = kinds[token]
            inner = answer[index + 1 : index + 1 + count]
            values = [_number(text) for text in inner]
            known = [value for value in values if value is not None]
            is_closed = answer[index + 1 + count : index + 2 + count] == [close]
            if is_closed and len(known) == count:
                pixels = tuple(2 * int(_divided(value, scale)) for value in known)
                found.append(Location(kind, pixels))
                index += count + 1
            else:
                shown = " ".join(answer[index : index + 2 + count])
                faults.append(
                    f"answer token {index}: found {shown!r}; expected {count} coordinates "
                    f"between {token} and {close}"
                )
        elif token in (tokens.box_close, tokens.point_close):
            faults.append(f"answer token {index}: found {token!r} that closes nothing")
        index += 1
    return tuple(found), tuple(faults)


def _scaled(text: str, scale: float) -> Location:
    numbers = [_number(part) for part in text.split(",")]
    known = [number for number in numbers if number is not None]
    if len(known) != len(numbers) or len(known) not in (2, 4):
        msg = (
            f"prompt: found a location {text!r}; expected <box>y1, x1, y2, x2</box> or "
            "<point>x, y</point> in pixels of the picture"
        )
        raise InputError(msg)
    scaled = [float(np.round(number / 2 * scale)) for number in known]
    if not all(abs(value) <= _MOST for value in scaled):
        msg = f"prompt: found a location {text!r}; expected pixels of the picture"
        raise InputError(msg)
    return Location("point" if len(scaled) == 2 else "box", tuple(int(value) for value in scaled))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _divided(number: float, divisor: np.float32) -> np.float32:
    return np.float32(number) * (np.float32(1) / divisor)
