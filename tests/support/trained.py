"""Bundles of the trained checkpoints, exported once a test run."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from support.run_folder import locked, run_folder

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.api.quantize import QuantizeOptions, quantize
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.calibration.default_recipes import TargetPrecision

__all__ = ["EXAMPLES", "exported", "quantized"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@functools.cache
def exported(checkpoint: str, precision: str = "fp32") -> Path:
    """The bundle of a checkpoint below examples/; a test that changes it works on a copy.

    The first process of a run that asks exports it. Each has a copy of its own: one that links
    weights for a while would make onnx-ir of another refuse them.
    """
    bundle = Path(_folder().name) / f"{checkpoint}-{precision}"
    common = run_folder()
    if common is None:
        _export(checkpoint, precision, bundle)
        return bundle
    source = common / bundle.name
    with locked(common / f"{bundle.name}.lock"):
        if not source.exists():
            _export(checkpoint, precision, source)
    shutil.copytree(source, bundle)
    return bundle


def _export(checkpoint: str, precision: str, bundle: Path) -> None:
    options = ExportOptions(EXAMPLES / checkpoint, bundle, precision=precision)
    export(options, SilentProgress())


def quantized(checkpoint: str, bundle: Path, precision: TargetPrecision, target: Path) -> Path:
    """A bundle of lower precision by the default recipe, calibrated on two questions."""
    folder = "questions" if checkpoint == "tinyllava" else f"questions-{checkpoint}"
    data = EXAMPLES / folder / "heldout.jsonl"
    recipe = RecipeOptions(precision)
    options = QuantizeOptions(bundle, target, recipe, calibration=data, max_samples=2)
    quantize(options, SilentProgress())
    return target


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vlmport-trained-")
