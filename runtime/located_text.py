"""Tokenizes text that has boxes and points in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import InputError
from vlmport.runtime.coordinates import Location, split_locations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from vlmport.contract import CoordinateTokens
    from vlmport.runtime.preprocessing.prepared import ImageLayout

__all__ = ["located_ids", "named_token"]


def located_ids(
    tokenizer: Tokenizer, text: str, tokens: CoordinateTokens, layouts: Sequence[ImageLayout]
) -> list[int]:
    """Token ids of a prompt's text, boxes and points as coordinate tokens.

    Without any of them, the text is tokenized as it is; else each part for itself.

    Args:
        tokenizer: the bundle's.
        text: with boxes and points in pixels of the user's picture.
        tokens: the model's coordinate tokens.
        layouts: of the prompt's images.

    Raises:
        InputError: if a location is malformed, outside of what the vocabulary can say, or cannot
            be told to belong to one of several images.

    Source: transformers 4.57, _transform_coordinates_and_tokenize. (5.23 computes the transformed
    text and then tokenizes the one without it.)
    """
    parts = split_locations(text, tokens, layouts[0].scale)
    if parts == [text]:
        return tokenizer.encode(text, add_special_tokens=False).ids
    has_location = any(isinstance(part, Location) for part in parts)
    if has_location and len({layout.scale for layout in layouts}) > 1:
        msg = (
            "prompt: found a box or a point and pictures that are shrunk by different factors, so "
            "it cannot be told which picture is meant; make the pictures smaller before"
        )
        raise InputError(msg)
    return [token for part in parts for token in _part_ids(tokenizer, part, tokens)]


def named_token(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary must have.

    Raises:
        InputError: if it has not.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        msg = (
            f"messages: the bundle's tokenizer has no token {token!r}; if it is a coordinate, give "
            "one inside the picture, else export the bundle again"
        )
        raise InputError(msg)
    return found


def _part_ids(tokenizer: Tokenizer, part: str | Location, tokens: CoordinateTokens) -> list[int]:
    if isinstance(part, str):
        if part == tokens.prompt_end:
            return [named_token(tokenizer, part)]
        return tokenizer.encode(part, add_special_tokens=False).ids
    is_box = part.kind == "box"
    opening = tokens.box_open if is_box else tokens.point_open
    closing = tokens.box_close if is_box else tokens.point_close
    names = (opening, *map(str, part.values), closing)
    return [named_token(tokenizer, name) for name in names]
