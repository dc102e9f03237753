"""Tells whether an optional module can be used, by importing it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["import_fault", "installed_version"]


def import_fault(module: str) -> str:
    """Why a module cannot be imported, in one line; "" if it can.

    An installed package whose libraries do not load is not usable, so it is really imported.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native package raises whatever its loader raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"installed, but does not load: {reason[0][:200]}"
    return ""


def installed_version(module: str) -> str:
    """Versions of the distributions that brought a module; a dotted one names its own."""
    if "." in module:  # a namespace that several distributions fill: cuda.bindings, cuda.pathfinder
        return importlib.metadata.version(module.replace(".", "-"))
    packages = _distributions().get(module, [])
    versions: set[str] = {importlib.metadata.version(package) for package in packages}
    return " / ".join(sorted(versions)) or "of unknown version"


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Which distributions brought each module; reads the metadata of all of them, 0.2 s."""
    return importlib.metadata.packages_distributions()
