"""A bundle is written into a temporary folder, which takes its name at the very end."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.contract import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmport.errors import VlmportError

__all__ = ["check_target", "new_bundle"]


def check_target(bundle: Path, *, overwrite: bool, error: type[VlmportError]) -> None:
    """Refuses a place that is taken, before any work is done.

    Raises:
        VlmportError: of the given type, if something is there that may not be replaced.
    """
    if not bundle.exists():
        return
    if not overwrite:
        msg = f"{bundle}: exists already; pass --overwrite to replace it, or choose another place"
        raise error(msg)
    is_bundle = (bundle / MANIFEST_NAME).is_file()
    if not bundle.is_dir() or (any(bundle.iterdir()) and not is_bundle):
        msg = f"{bundle}: is not a bundle, so --overwrite does not replace it; choose another place"
        raise error(msg)


@contextlib.contextmanager
def new_bundle(bundle: Path, *, error: type[VlmportError]) -> Iterator[Path]:
    """A temporary folder beside `bundle`, which replaces it if the block ends well.

    Whatever fails leaves nothing behind.

    Raises:
        VlmportError: of the given type, if the place is full or not writable.
    """
    workspace = _workspace(bundle, error)
    try:
        yield workspace
        workspace.chmod(0o755)  # mkdtemp makes it private; a bundle is for others to read
        if bundle.exists():
            shutil.rmtree(bundle)
        workspace.rename(bundle)
    except OSError as fault:
        msg = f"{bundle}: cannot be written ({fault.strerror}); free space or choose another place"
        raise error(msg) from fault
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _workspace(bundle: Path, error: type[VlmportError]) -> Path:
    try:
        bundle.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{bundle.name}.", dir=bundle.parent))
    except OSError as fault:
        msg = f"{bundle}: cannot be written ({fault.strerror}); choose another place"
        raise error(msg) from fault
