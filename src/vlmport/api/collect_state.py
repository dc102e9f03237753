"""The file from which a stopped collection goes on, and what says that it fits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.calibration.statistics_file import load_statistics, save_statistics
from vlmport.contract import MANIFEST_NAME
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

    from vlmport.calibration.samples import CalibrationSample
    from vlmport.calibration.statistics import Probe, Statistics

__all__ = ["digests", "load_state", "save_state"]

_DONE = "samples done"


def digests(
    bundle: Path,
    probes: Mapping[str, Sequence[Probe]],
    samples: Sequence[CalibrationSample],
    options: Sequence[int],
) -> dict[str, str]:
    """SHA-256 of each thing that the statistics follow from, contents of pictures included.

    Args:
        bundle: its manifest has the digests of its files.
        probes: what is collected.
        samples: their names do not count, their order does.
        options: numbers that change the statistics, in a fixed order.
    """
    wanted = {graph: [astuple(probe) for probe in of_graph] for graph, of_graph in probes.items()}
    asked = [
        [[_picture_digest(image) for image in sample.images], sample.prompt, sample.new_tokens]
        for sample in samples
    ]
    return {
        "bundle": _sha256((bundle / MANIFEST_NAME).read_bytes()),
        "probes": _sha256(json.dumps(wanted).encode()),
        "samples": _sha256(json.dumps(asked).encode()),
        "options": _sha256(json.dumps(list(options)).encode()),
    }


def save_state(path: Path, statistics: Statistics, fits: Mapping[str, str], done: int) -> None:
    """Writes statistics of the first `done` samples; `fits` as `digests` gives it."""
    save_statistics(path, statistics, {**fits, _DONE: str(done)})


def load_state(path: Path, fits: Mapping[str, str], *, mapped: bool) -> tuple[Statistics, int]:
    """The statistics of a file, and of how many samples they are; nothing if there is no file.

    Args:
        path: the file.
        fits: of this run.
        mapped: see `load_statistics`.

    Raises:
        CalibrationError: if the file is damaged, or of another run.
    """
    if not path.exists():
        return {}, 0
    statistics, notes = load_statistics(path, mapped=mapped)
    differing = [what for what, digest in fits.items() if notes.get(what) != digest]
    if differing:
        msg = (
            f"{path}: holds statistics of other {', other '.join(differing)}; expected those of "
            "this run; delete the file to collect again, or name another one"
        )
        raise CalibrationError(msg)
    return statistics, int(notes[_DONE])


def _picture_digest(image: Path | Image) -> str:
    if isinstance(image, Path):
        return _sha256(image.read_bytes())
    return _sha256(f"{image.mode} {image.size}".encode() + image.tobytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
