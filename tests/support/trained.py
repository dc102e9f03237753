"""Bundles of the trained checkpoints, exported once a process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress

__all__ = ["EXAMPLES", "exported"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@functools.cache
def exported(checkpoint: str, precision: str = "fp32") -> Path:
    """The bundle of a checkpoint below examples/; a test that changes it works on a copy.

    Not shared between processes: one that links weights for a while would make onnx-ir of another
    refuse them.
    """
    bundle = Path(_folder().name) / f"{checkpoint}-{precision}"
    options = ExportOptions(EXAMPLES / checkpoint, bundle, precision=precision)
    export(options, SilentProgress())
    return bundle


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vlmport-trained-")
