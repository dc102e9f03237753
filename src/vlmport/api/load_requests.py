"""Reads the requests of `vlmport load`: one JSON object a line, all faults told at once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vlmport.api.line_fields import (
    LineError,
    line_object,
    listed,
    one_of,
    shown,
    text_lines,
    texts_of,
)
from vlmport.api.questions import IMAGE_KEYS, SCORING_KEYS, TEXT_KEYS
from vlmport.errors import InputError, close_matches
from vlmport.runtime.messages import parse_messages
from vlmport.runtime.request import Request
from vlmport.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_requests"]

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingOptions))
_WHOLE_NUMBERS = ("max_new_tokens", "top_k", "seed")
_KNOWN = (*IMAGE_KEYS, *TEXT_KEYS, "messages", "stop", "max_new_tokens", *_SAMPLING)


def read_requests(path: Path) -> tuple[Request, ...]:
    """Reads and checks a file of requests; pictures are read later, by `wire_request`.

    Args:
        path: its lines are objects {"image": path or list of paths, "prompt": text or "messages":
            chat, "max_new_tokens", "stop", "temperature", ...}; paths are relative to its folder.
            Questions of `vlmport evaluate` are requests, too. Empty lines are passed over.

    Raises:
        InputError: if it cannot be read, has no request, or lines are wrong; names all of them.
    """
    requests: list[Request] = []
    faults: list[str] = []
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(line_object(line), path.parent))
        except (LineError, InputError) as error:
            faults.append(f"line {number}: {error}")
    if faults:
        raise InputError(listed(f"{path}: found {len(faults)} wrong lines", faults))
    if not requests:
        raise InputError(f"{path}: found no request; expected one JSON object a line")
    return tuple(requests)


def _request(fields: dict[str, object], folder: Path) -> Request:
    # Files of questions for `vlmport evaluate` serve here as they are.
    unknown = [key for key in fields if key not in _KNOWN and key not in SCORING_KEYS]
    if unknown:
        raise LineError(f"unknown key {unknown[0]!r}; {close_matches(unknown[0], _KNOWN)}")
    messages = fields.get("messages")
    text = one_of(fields, TEXT_KEYS, needed=messages is None)
    if text is not None and not isinstance(text, str):
        raise LineError(f"prompt: found {shown(text)}; expected text")
    sampling: dict[str, Any] = {name: _number(fields, name) for name in _SAMPLING if name in fields}
    most_tokens: Any = _number(fields, "max_new_tokens")
    return Request(
        prompt=text,
        messages=None if messages is None else parse_messages(messages),
        images=tuple(
            folder / image
            for image in texts_of(one_of(fields, IMAGE_KEYS, needed=False) or [], "image")
        ),
        max_new_tokens=most_tokens,
        stop_strings=texts_of(fields.get("stop") or [], "stop"),
        sampling=SamplingOptions(**sampling),
    )


def _number(fields: dict[str, object], name: str) -> int | float | None:
    value = fields.get(name)
    kinds = (int,) if name in _WHOLE_NUMBERS else (int, float)
    if value is None and name in ("seed", "max_new_tokens"):
        return None
    if isinstance(value, bool) or not isinstance(value, kinds):
        words = "a whole number" if name in _WHOLE_NUMBERS else "a number"
        raise LineError(f"{name}: found {shown(value)}; expected {words}")
    return value
