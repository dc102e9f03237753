"""Which versions of the libraries made a report."""

from __future__ import annotations

import importlib.metadata
import platform

import vlmport

__all__ = ["library_versions"]

_TOOLS = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")


def library_versions(more: tuple[str, ...] = ()) -> dict[str, str]:
    """Name -> version of vlmport, Python and the libraries that compute, as far as installed.

    Args:
        more: further libraries.
    """
    versions = {"vlmport": vlmport.__version__, "python": platform.python_version()}
    for tool in (*_TOOLS, *more):
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue  # onnxruntime comes under one of two names
    return versions
