"""Loads families that are defined outside the package: installed ones and single files.

Both run the code of whoever wrote them: an installed distribution is trusted by its installation,
a file by being named on the command line. Nothing is searched for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmport.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ENTRY_POINT_GROUP", "OutsideObject", "family_of_file", "installed_objects"]

ENTRY_POINT_GROUP = "vlmport.families"


@dataclass(frozen=True, slots=True)
class OutsideObject:
    """What an entry point gave.

    Attributes:
        origin: who offers it, for messages.
        value: the object, or None if it could not be loaded.
        fault: why it could not be loaded; "" if it was.
    """

    origin: str
    value: Any  # foreign code may put anything there; the caller checks it
    fault: str = ""


def installed_objects() -> list[OutsideObject]:
    """The objects of all entry points of the group, ordered by name.

    A fault of one entry point is returned in its place, so that it does not keep the others, or
    the package's own families, from being used.
    """
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return [_loaded(point) for point in sorted(points, key=lambda point: (point.name, point.value))]


def family_of_file(path: Path) -> Any:
    """Runs a Python file and returns what it calls FAMILY.

    Raises:
        ExportError: if there is no such file, it fails, or it does not define FAMILY.
    """
    if not path.is_file():
        msg = f"{path}: no such file; expected a Python file that defines FAMILY"
        raise ExportError(msg)
    # A name that no other module has, so that the file hides none and is hidden by none.
    name = f"vlmport_family_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"{path}: not a Python file; expected one that ends in .py and defines FAMILY"
        raise ExportError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        msg = f"{path}: cannot be run as a family file: {_reason(error)}; correct the file"
        raise ExportError(msg) from error
    if not hasattr(module, "FAMILY"):
        msg = (
            f"{path}: defines no FAMILY; expected FAMILY = Family(name=..., model_types=..., "
            "plan=...) with Family from vlmport.export.family"
        )
        raise ExportError(msg)
    return module.FAMILY


def _loaded(point: importlib.metadata.EntryPoint) -> OutsideObject:
    distribution = point.dist
    owner = f"{distribution.name} {distribution.version}" if distribution else "no distribution"
    origin = f"entry point {point.name!r} of {owner}"
    try:
        return OutsideObject(origin, point.load())
    except Exception as error:  # foreign code may raise anything
        return OutsideObject(origin, None, f"{point.value!r} cannot be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The error in one line, with the place that raised it if it has one."""
    text = str(error).strip()
    words = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    # A syntax error names its place itself.
    if not frames or isinstance(error, SyntaxError):
        return words
    return f"{words} ({frames[-1].filename}, line {frames[-1].lineno})"
