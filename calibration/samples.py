"""Calibration data: pictures and prompts, from a folder, from JSON lines, or made by a program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

__all__ = ["GENERAL_QUESTION", "CalibrationSample", "load_samples"]

# For pictures that come without a question.
GENERAL_QUESTION = "Describe this picture in detail."
SAMPLES_FILE = "samples.jsonl"
_PICTURES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_TEXTS = ("prompt", "question", "text")
_IMAGES = ("image", "images")
_KEYS = (
    'expected {"image": path or list of paths, "prompt": text}; "question" or "text" may stand '
    'for "prompt"'
)


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """One question, as a user would ask it.

    Attributes:
        name: for messages.
        images: paths or Pillow images, in the order of the prompt.
        prompt: one user turn.
        new_tokens: tokens of the answer to decode at most; None for the collection's own number.
    """

    name: str
    images: tuple[Path | Image, ...]
    prompt: str
    new_tokens: int | None = None


def load_samples(source: Path) -> tuple[CalibrationSample, ...]:
    """Reads calibration data; pictures are not opened here.

    Args:
        source: a file of JSON lines ({"image": path or list of paths, "prompt": text,
            "new_tokens": optional}; paths relative to the file; other keys are passed over), or a
            folder: its samples.jsonl if it has one, else every picture directly in it with a
            general question.

    Raises:
        CalibrationError: if nothing is there, or lines are wrong; all faults listed at once.
    """
    try:
        if source.is_dir():
            listed = source / SAMPLES_FILE
            return _from_lines(listed) if listed.is_file() else _from_folder(source)
        if not source.exists():
            msg = f"{source}: no such path; expected a folder of pictures, or a file of JSON lines"
            raise CalibrationError(msg)
        return _from_lines(source)
    except OSError as error:
        msg = f"{source}: cannot be read ({error.strerror}); expected calibration data"
        raise CalibrationError(msg) from error


def _from_folder(folder: Path) -> tuple[CalibrationSample, ...]:
    entries = sorted(folder.iterdir())
    pictures = [path for path in entries if path.suffix.lower() in _PICTURES]
    if not pictures:
        msg = (
            f"{folder}: found no picture and no {SAMPLES_FILE} among its {len(entries)} entries; "
            f"expected files ending in {', '.join(sorted(_PICTURES))}; put some there"
        )
        raise CalibrationError(msg)
    return tuple(CalibrationSample(path.name, (path,), GENERAL_QUESTION) for path in pictures)


def _from_lines(path: Path) -> tuple[CalibrationSample, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text ({error.reason}); {_KEYS}, one object a line"
        raise CalibrationError(msg) from error
    samples: list[CalibrationSample] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            samples.append(_sample(json.loads(line), f"{path.name}, line {number}", path.parent))
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: {error}")
    if faults:
        raise CalibrationError(_fault_list(path, faults))
    if not samples:
        msg = f"{path}: found no sample; {_KEYS}, one object a line"
        raise CalibrationError(msg)
    return tuple(samples)


def _sample(content: Any, name: str, folder: Path) -> CalibrationSample:  # Any: parsed JSON
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}; {_KEYS}")
    images = _images(next((content[key] for key in _IMAGES if key in content), None))
    prompt = next((content[key] for key in _TEXTS if key in content), None)
    if prompt is None and images:
        prompt = GENERAL_QUESTION
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"no prompt; {_KEYS}")
    new_tokens = content.get("new_tokens")
    is_count = isinstance(new_tokens, int) and not isinstance(new_tokens, bool) and new_tokens > 0
    if new_tokens is not None and not is_count:
        raise ValueError(f"new_tokens: found {new_tokens!r}; expected a number of at least 1")
    return CalibrationSample(name, tuple(folder / path for path in images), prompt, new_tokens)


def _images(content: Any) -> list[str]:  # Any: parsed JSON
    paths = [] if content is None else content if isinstance(content, list) else [content]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"image: found {json.dumps(content)[:60]}; {_KEYS}")
    return paths


def _fault_list(path: Path, faults: Sequence[str]) -> str:
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    return f"{path}: {count} found:\n" + "\n".join(f"  {fault}" for fault in faults)
