"""Reads the questions of `vlmport evaluate`: one JSON object a line, all faults told at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.scoring import LEAST_VQA_ANSWERS
from vlmport.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.api.scoring import Metric

__all__ = ["Question", "listed", "read_questions"]

_IMAGES = ("image", "images")
_TEXTS = ("question", "prompt", "text")  # "text" and "label" are POPE's own names
_ANSWERS = ("answer", "answers", "label")
_IDENTITIES = ("id", "question_id")
_KINDS = ("kind", "category")
_MOST_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its right answers.

    Attributes:
        id: as in the file; the line's number if it has none.
        kind: as in the file, "" if it has none; scores are given for each kind.
        images: paths, in the order in which the model is shown them; may be none.
        text: the question.
        references: right answers, one or more.
    """

    id: str
    kind: str
    images: tuple[Path, ...]
    text: str
    references: tuple[str, ...]


def read_questions(path: Path, metric: Metric, limit: int | None = None) -> tuple[Question, ...]:
    """Reads and checks a file of questions; pictures are not opened, see `check_questions`.

    Args:
        path: its lines are objects {"image": path or list of paths, "question": text, "answer":
            text or "answers": list of texts, "id", "kind"}; paths are relative to its folder.
            Empty lines and further keys are passed over. See docs/evaluation.md.
        metric: what the answers must allow.
        limit: most questions to take, from the top; the rest is not read.

    Raises:
        InputError: if it cannot be read, has no question, or lines are wrong; names all of them.
    """
    questions: list[Question] = []
    faults: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        if len(questions) + len(faults) == limit:
            break
        if not line.strip():
            continue
        try:
            questions.append(_question(line, number, path.parent, metric))
        except _LineError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        raise InputError(listed(f"{path}: found {len(faults)} wrong lines", faults))
    if not questions:
        raise InputError(f"{path}: found no question; expected one JSON object a line")
    return tuple(questions)


def listed(found: str, faults: list[str]) -> str:
    """A message with one line a fault, the first hundred of them."""
    shown = [f"\n  {fault}" for fault in faults[:_MOST_SHOWN]]
    more = len(faults) - len(shown)
    rest = f"\n  ... and {more} more" if more else ""
    return f"{found}; correct them:{''.join(shown)}{rest}"


class _LineError(Exception):
    """What is wrong with one line."""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        msg = f"{path}: no such file; expected questions, one JSON object a line"
        raise InputError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); expected a file of questions"
        raise InputError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        raise InputError(msg) from error


def _question(line: str, number: int, folder: Path, metric: Metric) -> Question:
    try:
        entry: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _LineError(f"not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise _LineError(f"found {_shown(entry)}; expected an object with a question")
    fields: dict[str, object] = entry
    text = _one_of(fields, _TEXTS)
    if not isinstance(text, str) or not text.strip():
        raise _LineError(f"question: found {_shown(text)}; expected text")
    references = _texts(_one_of(fields, _ANSWERS), "answer")
    if not references:
        raise _LineError("answer: found none; expected one or more")
    _check_references(references, metric)
    images = _texts(_one_of(fields, _IMAGES, needed=False) or [], "image")
    return Question(
        id=_name(_one_of(fields, _IDENTITIES, needed=False), str(number), "id"),
        kind=_name(_one_of(fields, _KINDS, needed=False), "", "kind"),
        images=tuple(folder / image for image in images),
        text=text,
        references=references,
    )


def _check_references(references: tuple[str, ...], metric: Metric) -> None:
    if metric == "pope":
        words = [reference.strip().lower() for reference in references]
        if len(words) != 1 or words[0] not in ("yes", "no"):
            raise _LineError(f'answer: found {_shown(references)}; "pope" expects "yes" or "no"')
    if metric == "vqa" and len(references) < LEAST_VQA_ANSWERS:
        raise _LineError(
            f'answer: found {len(references)}; "vqa" expects those of ten people, at least '
            f"{LEAST_VQA_ANSWERS}"
        )


def _one_of(fields: dict[str, object], names: tuple[str, ...], *, needed: bool = True) -> object:
    present = [name for name in names if name in fields]
    if len(present) > 1:
        raise _LineError(f"found both {present[0]!r} and {present[1]!r}; keep one")
    if needed and not present:
        quoted = ", ".join(map(repr, fields)) or "none"
        raise _LineError(f"keys: found {quoted}; expected one of {', '.join(map(repr, names))}")
    return fields[present[0]] if present else None


def _texts(value: object, name: str) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    texts = [entry for entry in entries if isinstance(entry, str) and entry.strip()]
    if len(texts) != len(entries):
        raise _LineError(f"{name}: found {_shown(value)}; expected text or a list of texts")
    return tuple(texts)


def _name(value: object, default: str, key: str) -> str:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _LineError(f"{key}: found {_shown(value)}; expected text or a whole number")
    return str(value)


def _shown(value: object) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}..."
