"""What answers are made of: one value for each kind of answer that a manifest may name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

__all__ = [
    "AnswerFormat",
    "CoordinateAnswers",
    "CoordinateTokens",
    "LocationTokenAnswers",
    "TextAnswers",
]

# An unknown key in a manifest is a fault: a newer writer meant something that we would ignore.
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class CoordinateTokens:
    """Tokens for boxes and points in a prompt with images, and in answers.

    A coordinate is one token: half of a pixel's row or column in the resized image, in decimal. In
    text a box is "<box>y1, x1, y2, x2</box>" and a point "<point>x, y</point>", in pixels of the
    user's picture.

    Attributes:
        box_open: the token that opens a box.
        box_close: that closes it.
        point_open: that opens a point.
        point_close: that closes it.
        prompt_end: text at the end of every prompt with images; a token by itself where it follows
            a box or a point.
    """

    __pydantic_config__ = _STRICT
    box_open: str
    box_close: str
    point_open: str
    point_close: str
    prompt_end: str


@dataclass(frozen=True, slots=True)
class TextAnswers:
    """Answers are text and nothing else.

    Attributes:
        kind: "text".
    """

    __pydantic_config__ = _STRICT
    kind: Literal["text"]


@dataclass(frozen=True, slots=True)
class LocationTokenAnswers:
    """Answers may name regions of the picture by tokens of their own.

    A region is four location tokens <locNNNN> (y_min, x_min, y_max, x_max), no or
    `codes_per_mask` segment tokens <segNNN>, and a label; ";" stands between regions.

    Attributes:
        kind: "location_tokens".
        locations: parts of the picture's height, and of its width, that a location counts.
        segment_codes: codes that a segment token may stand for.
        codes_per_mask: segment tokens that describe a mask.

    Source: google-research/big_vision, transfers/segmentation.py.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["location_tokens"]
    locations: int
    segment_codes: int
    codes_per_mask: int


@dataclass(frozen=True, slots=True)
class CoordinateAnswers:
    """Answers may name boxes and points by the coordinate tokens of the prompt form.

    Attributes:
        kind: "coordinate_tokens".
    """

    __pydantic_config__ = _STRICT
    kind: Literal["coordinate_tokens"]


# One dataclass for each kind of answer; `kind` tells them apart in JSON.
AnswerFormat = TextAnswers | LocationTokenAnswers | CoordinateAnswers
