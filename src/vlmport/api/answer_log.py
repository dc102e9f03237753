"""Answers on disk as they come, so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmport.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["Answer", "AnswerLog", "LogKey"]

_FORMAT = "vlmport answers 1"


@dataclass(frozen=True, slots=True)
class LogKey:
    """What answers depend on; a state made with any other value is refused.

    Attributes:
        bundle: SHA-256 of the bundle's manifest, which has the digests of all other files.
        data: SHA-256 of the questions' texts and the bytes of their pictures.
        max_new_tokens: most tokens of an answer; None for the bundle's default.
        batch: questions answered together: neighbours change roundings, and so near ties.
        backend: what computes the graphs.
    """

    bundle: str
    data: str
    max_new_tokens: int | None
    batch: int
    backend: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a bundle answered.

    Attributes:
        text: without special tokens.
        token_ids: generated, the end-of-sequence token included.
        finish_reason: "stop" or "length".
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class AnswerLog:
    """A JSONL file: a line with the key, then one line an answer, by the question's place.

    Args:
        path: the file; made if there is none. None keeps nothing.
        key: what the answers depend on.

    Raises:
        InputError: if the file is none of ours or was made with another key.
    """

    def __init__(self, path: Path | None, key: LogKey) -> None:
        self._path = path
        self.answers: dict[int, Answer] = {}
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(path, key)
        else:
            header = {"format": _FORMAT, **dataclasses.asdict(key)}
            _append(path, [header])

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Takes answers in and, if there is a file, writes them to the disk before it returns.

        Args:
            answers: place of the question -> its answer.
        """
        self.answers.update(answers)
        if self._path is not None:
            lines = [
                {"question": place, **dataclasses.asdict(answer)}
                for place, answer in answers.items()
            ]
            _append(self._path, lines)

    def _read(self, path: Path, key: LogKey) -> None:
        with _opened(path, "r+b") as file:
            content = file.read()
            # A killed run may leave half a line; whole ones end with a line break.
            whole = content.rfind(b"\n") + 1
            lines = content[:whole].splitlines()
            header = _entry(lines[0], path, 1) if lines else {}
            if header.pop("format", None) != _FORMAT:
                msg = f"{path}: not a state of vlmport evaluate; choose another file, or delete it"
                raise InputError(msg)
            _check_key(header, key, path)
            for number, line in enumerate(lines[1:], start=2):
                place, answer = _answer(_entry(line, path, number), path, number)
                self.answers[place] = answer
            file.truncate(whole)


def _check_key(header: Mapping[str, object], key: LogKey, path: Path) -> None:
    wanted = dataclasses.asdict(key)
    differing = [
        f"{_words(name)} {_brief(header.get(name))} (this run: {_brief(value)})"
        for name, value in wanted.items()
        if header.get(name) != value
    ]
    if differing:
        msg = (
            f"{path}: a state of another evaluation, made with {'; '.join(differing)}; run with "
            "the same, or choose another file"
        )
        raise InputError(msg)


def _words(name: str) -> str:
    return {"data": "data (questions and pictures)"}.get(name, name)


def _brief(value: object) -> str:
    """Of a digest the beginning, which tells two apart as well."""
    if isinstance(value, str) and len(value) == 2 * hashlib.sha256().digest_size:
        return f"{value[:12]}..."
    return repr(value)


def _entry(line: bytes, path: Path, number: int) -> dict[str, object]:
    try:
        entry: object = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        msg = f"{path}, line {number}: not a line of vlmport evaluate; choose another file"
        raise InputError(msg)
    return entry


def _answer(entry: Mapping[str, object], path: Path, number: int) -> tuple[int, Answer]:
    match entry:
        case {
            "question": int(place),
            "text": str(text),
            "token_ids": list(ids),
            "finish_reason": str(reason),
        }:
            return place, Answer(text, tuple(ids), reason)
        case _:
            msg = f"{path}, line {number}: not an answer; delete the file and start again"
            raise InputError(msg)


def _append(path: Path, entries: Sequence[Mapping[str, object]]) -> None:
    content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with _opened(path, "ab") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())


def _opened(path: Path, mode: Literal["ab", "r+b"]) -> BinaryIO:
    try:
        return path.open(mode)
    except OSError as error:
        msg = f"{path}: cannot be opened ({error.strerror}); expected a file to keep answers in"
        raise InputError(msg) from error
