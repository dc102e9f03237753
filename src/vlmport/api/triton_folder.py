"""The place of a model repository: what may be replaced there, and what the marker file says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vlmport.errors import InputError
from vlmport.manifest import file_entry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["MARKER_NAME", "check_place", "write_marker"]

MARKER_NAME = "vlmport-repository.json"
_SCHEMA_VERSION = 1


def check_place(repository: Path, *, overwrite: bool) -> None:
    """Refuses a place that is taken, before any work is done.

    Raises:
        InputError: if something is there that may not be replaced.
    """
    if not repository.exists() and not repository.is_symlink():
        return
    if not overwrite:
        msg = (
            f"{repository}: exists already; pass --overwrite to replace it, or choose another place"
        )
        raise InputError(msg)
    if repository.is_symlink() or not repository.is_dir():
        msg = (
            f"{repository}: is no folder, so --overwrite does not replace it; choose another place"
        )
        raise InputError(msg)
    if any(repository.iterdir()) and not _is_ours(repository / MARKER_NAME):
        msg = (
            f"{repository}: is no repository that vlmport wrote (no {MARKER_NAME}), so "
            "--overwrite does not replace it; choose another place"
        )
        raise InputError(msg)


def _is_ours(marker: Path) -> bool:
    try:
        content: Any = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "vlmport" in content and "models" in content


def write_marker(repository: Path, content: Mapping[str, object]) -> None:
    """Writes the marker file with a digest of every other file, last.

    Args:
        repository: the folder, complete.
        content: what the repository is.
    """
    files = sorted(path for path in repository.rglob("*") if path.is_file())
    entries = [file_entry(repository, path) for path in files]
    listed = [{"path": one.path, "size": one.size, "sha256": one.sha256} for one in entries]
    marker = {"schema_version": _SCHEMA_VERSION, **content, "files": listed}
    text = json.dumps(marker, indent=2) + "\n"
    (repository / MARKER_NAME).write_text(text, encoding="utf-8")
