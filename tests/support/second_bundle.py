"""A second bundle beside another one: the same graphs, the decoder's weights slightly off."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vlmport.manifest import file_entry, load_manifest, save_manifest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["disturbed"]

_WEIGHTS = "decoder.onnx.data"


def disturbed(source: Path, folder: Path, noise: float) -> Path:
    """Copies a float32 bundle and multiplies every weight of its decoder by about 1.

    Args:
        source: the bundle.
        folder: is made.
        noise: standard deviation of the factors.
    """
    shutil.copytree(source, folder)
    weights = np.fromfile(folder / _WEIGHTS, np.float32)
    factors = 1 + noise * np.random.default_rng(5).standard_normal(len(weights))
    (weights * factors).astype(np.float32).tofile(folder / _WEIGHTS)
    manifest = load_manifest(folder)
    files = tuple(
        file_entry(folder, folder / entry.path) if entry.path == _WEIGHTS else entry
        for entry in manifest.files
    )
    save_manifest(folder, replace(manifest, files=files))
    return folder
