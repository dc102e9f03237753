"""Puts a measured table between two marks of a document."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_between"]


def write_between(document: Path, marks: tuple[str, str], table: str) -> None:
    """Replaces what stands between the marks, each of which the document has once."""
    begin, end = marks
    before, rest = document.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    document.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
