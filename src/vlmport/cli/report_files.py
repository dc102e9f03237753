"""Files that a verb writes its report to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_is_writable"]


def check_is_writable(file: Path | None) -> None:
    """Refuses a report file that cannot be written before minutes are spent on the report.

    Raises:
        InputError: if it is a folder, or lies in none.
    """
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{file}: a folder; expected a file to write the report to")
    if not file.parent.is_dir():
        raise InputError(f"{file}: no such folder {file.parent}; make it first")
