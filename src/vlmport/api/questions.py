"""Reads the questions of `vlmport evaluate`: one JSON object a line, all faults told at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.line_fields import (
    LineError,
    line_object,
    listed,
    name_of,
    one_of,
    shown,
    text_lines,
    texts_of,
)
from vlmport.api.scoring import LEAST_VQA_ANSWERS
from vlmport.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.api.scoring import Metric

__all__ = ["IMAGE_KEYS", "SCORING_KEYS", "TEXT_KEYS", "Question", "read_questions"]

IMAGE_KEYS = ("image", "images")
TEXT_KEYS = ("question", "prompt", "text")  # "text" and "label" are POPE's own names
_ANSWERS = ("answer", "answers", "label")
_IDENTITIES = ("id", "question_id")
_KINDS = ("kind", "category")
SCORING_KEYS = (*_ANSWERS, *_IDENTITIES, *_KINDS)


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
    for number, line in enumerate(text_lines(path), start=1):
        if len(questions) + len(faults) == limit:
            break
        if not line.strip():
            continue
        try:
            questions.append(_question(line, number, path.parent, metric))
        except LineError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        raise InputError(listed(f"{path}: found {len(faults)} wrong lines", faults))
    if not questions:
        raise InputError(f"{path}: found no question; expected one JSON object a line")
    return tuple(questions)


def _question(line: str, number: int, folder: Path, metric: Metric) -> Question:
    fields = line_object(line)
    text = one_of(fields, TEXT_KEYS)
    if not isinstance(text, str) or not text.strip():
        raise LineError(f"question: found {shown(text)}; expected text")
    references = texts_of(one_of(fields, _ANSWERS), "answer")
    if not references:
        raise LineError("answer: found none; expected one or more")
    _check_references(references, metric)
    images = texts_of(one_of(fields, IMAGE_KEYS, needed=False) or [], "image")
    return Question(
        id=name_of(one_of(fields, _IDENTITIES, needed=False), str(number), "id"),
        kind=name_of(one_of(fields, _KINDS, needed=False), "", "kind"),
        images=tuple(folder / image for image in images),
        text=text,
        references=references,
    )


def _check_references(references: tuple[str, ...], metric: Metric) -> None:
    if metric == "pope":
        words = [reference.strip().lower() for reference in references]
        if len(words) != 1 or words[0] not in ("yes", "no"):
            raise LineError(f'answer: found {shown(references)}; "pope" expects "yes" or "no"')
    if metric == "vqa" and len(references) < LEAST_VQA_ANSWERS:
        raise LineError(
            f'answer: found {len(references)}; "vqa" expects those of ten people, at least '
            f"{LEAST_VQA_ANSWERS}"
        )
