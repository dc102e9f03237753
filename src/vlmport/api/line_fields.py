"""Reads files of one JSON object a line, so that all faults of all lines can be told at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vlmport.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "LineError",
    "line_object",
    "listed",
    "name_of",
    "one_of",
    "shown",
    "text_lines",
    "texts_of",
]

_MOST_SHOWN = 100


class LineError(Exception):
    """What is wrong with one line."""


def text_lines(path: Path) -> list[str]:
    """The lines of a file, empty ones too.

    Raises:
        InputError: if it cannot be read as UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        msg = f"{path}: no such file; expected one JSON object a line"
        raise InputError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); expected one JSON object a line"
        raise InputError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        raise InputError(msg) from error


def line_object(line: str) -> dict[str, object]:
    """The object of a line.

    Raises:
        LineError: if it is none.
    """
    try:
        entry: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError(f"not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise LineError(f"found {shown(entry)}; expected an object")
    return entry


def one_of(fields: dict[str, object], names: tuple[str, ...], *, needed: bool = True) -> object:
    """The value of the one key that a line has among those of the same meaning.

    Args:
        fields: of the line.
        names: the keys.
        needed: whether there must be one; else None stands for its absence.

    Raises:
        LineError: if there are several, or none where one is needed.
    """
    present = [name for name in names if name in fields]
    if len(present) > 1:
        raise LineError(f"found both {present[0]!r} and {present[1]!r}; keep one")
    if needed and not present:
        quoted = ", ".join(map(repr, fields)) or "none"
        raise LineError(f"keys: found {quoted}; expected one of {', '.join(map(repr, names))}")
    return fields[present[0]] if present else None


def texts_of(value: object, name: str) -> tuple[str, ...]:
    """A text or a list of texts; `name` is the key.

    Raises:
        LineError: if it is neither, or a text is empty.
    """
    entries = value if isinstance(value, list) else [value]
    texts = [entry for entry in entries if isinstance(entry, str) and entry.strip()]
    if len(texts) != len(entries):
        raise LineError(f"{name}: found {shown(value)}; expected text or a list of texts")
    return tuple(texts)


def name_of(value: object, default: str, key: str) -> str:
    """A text or a whole number as text; `default` for None.

    Raises:
        LineError: if it is neither.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise LineError(f"{key}: found {shown(value)}; expected text or a whole number")
    return str(value)


def shown(value: object) -> str:
    """A value as JSON, cut to what fits a message."""
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}..."


def listed(found: str, faults: list[str]) -> str:
    """A message with one line a fault, the first hundred of them."""
    lines = [f"\n  {fault}" for fault in faults[:_MOST_SHOWN]]
    more = len(faults) - len(lines)
    rest = f"\n  ... and {more} more" if more else ""
    return f"{found}; correct them:{''.join(lines)}{rest}"
