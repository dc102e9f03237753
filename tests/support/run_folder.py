"""A folder that the processes of one test run have in common."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

__all__ = ["keep_run_folder", "locked", "run_folder"]

_VARIABLE = "VLMPORT_TEST_RUN_FOLDER"


def keep_run_folder(config: pytest.Config) -> None:
    """Remembers it: pytest's own for this run, above the folder of this worker process."""
    if hasattr(config, "workerinput"):
        os.environ[_VARIABLE] = str(Path(config.option.basetemp).parent)


def run_folder() -> Path | None:
    """The folder; None if there is only one process."""
    found = os.environ.get(_VARIABLE)
    return None if found is None else Path(found)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time into the block; `path` is a file that is made for it."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
