"""Statistics in one safetensors file, with the numbers and notes beside the arrays as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.calibration.statistics import Histogram, ValueStatistics
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from vlmport.calibration.statistics import Statistics

__all__ = ["load_statistics", "save_statistics"]

FORMAT = "vlmport statistics 1"
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_ARRAYS = ("channel_amax", "counts", "second_moment")


def save_statistics(path: Path, statistics: Statistics, notes: Mapping[str, str]) -> None:
    """Writes statistics in one step, so that no half file is ever seen.

    Arrays go to the file one after the other without a copy; safetensors' own writer would hold
    all of them twice.

    Args:
        path: the file; its folder is made if it is missing.
        statistics: finite or not yet seen.
        notes: text that is read back as it is.

    Raises:
        CalibrationError: if the file cannot be written.
    """
    arrays: list[NDArray[Any]] = []
    header: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {}
    offset = 0
    for graph, of_graph in statistics.items():
        values[graph] = {}
        for value, found in of_graph.items():
            values[graph][value] = _numbers(found)
            for kind, array in _arrays(found).items():
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                dtype = next(name for name, known in _DTYPES.items() if known == little.dtype)
                end = offset + little.nbytes
                header[f"{graph}/{value}/{kind}"] = {
                    "dtype": dtype,
                    "shape": list(little.shape),
                    "data_offsets": [offset, end],
                }
                arrays.append(little)
                offset = end
    text = {"format": FORMAT, "notes": json.dumps(dict(notes)), "values": json.dumps(values)}
    _write(path, {"__metadata__": text, **header}, arrays)


def load_statistics(path: Path, *, mapped: bool = False) -> tuple[Statistics, dict[str, str]]:
    """Reads what `save_statistics` wrote.

    Args:
        path: the file.
        mapped: whether second moments are left in the file and read where they are used.

    Returns:
        the statistics and the notes.

    Raises:
        CalibrationError: if the file cannot be read or is none of ours.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        metadata = header.pop("__metadata__")
        _check_format(metadata["format"])
        values: dict[str, dict[str, Any]] = json.loads(metadata["values"])
        notes: dict[str, str] = json.loads(metadata["notes"])
        arrays = {
            name: _array(path, 8 + length, entry, mapped and name.endswith("/second_moment"))
            for name, entry in header.items()
        }
        statistics = {
            graph: {
                value: _statistics(numbers, f"{graph}/{value}/", arrays)
                for value, numbers in of_graph.items()
            }
            for graph, of_graph in values.items()
        }
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); expected saved statistics"
        raise CalibrationError(msg) from error
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        msg = (
            f"{path}: not a file of statistics, or a damaged one ({error}); delete it to collect "
            "them again"
        )
        raise CalibrationError(msg) from error
    return statistics, notes


def _check_format(found: str) -> None:
    if found != FORMAT:
        raise ValueError(f"its format is {found!r}, not {FORMAT!r}")


def _numbers(found: ValueStatistics) -> dict[str, Any]:
    """What is no array; JSON keeps every bit of a double, and Python's writes infinities."""
    return {
        "positions": found.positions,
        "minimum": found.minimum,
        "maximum": found.maximum,
        "smallest_magnitude": found.smallest_magnitude,
        "bin_width": found.histogram.bin_width if found.histogram else None,
    }


def _arrays(found: ValueStatistics) -> dict[str, NDArray[Any]]:
    counts = found.histogram.counts if found.histogram else None
    arrays = (found.channel_amax, counts, found.second_moment)
    return {kind: array for kind, array in zip(_ARRAYS, arrays, strict=True) if array is not None}


def _write(path: Path, header: dict[str, Any], arrays: list[NDArray[Any]]) -> None:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # arrays begin at multiples of 8
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            for array in arrays:
                stream.write(np.ascontiguousarray(array).data)
        os.chmod(temporary, 0o644)  # mkstemp makes a private file
        os.replace(temporary, path)
    except OSError as error:
        msg = f"{path}: cannot be written ({error.strerror}); expected a place for statistics"
        raise CalibrationError(msg) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _array(path: Path, base: int, entry: dict[str, Any], mapped: bool) -> NDArray[Any]:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if end - start != dtype.itemsize * int(np.prod(shape)) or path.stat().st_size < base + end:
        raise ValueError("an array does not have the length of its shape")
    if mapped:
        return np.memmap(path, dtype, "r", base + start, shape)
    count = int(np.prod(shape))
    return np.fromfile(path, dtype, count, offset=base + start).reshape(shape)


def _statistics(
    numbers: dict[str, Any], prefix: str, arrays: Mapping[str, NDArray[Any]]
) -> ValueStatistics:
    channel_amax, counts, second_moment = (arrays.get(prefix + kind) for kind in _ARRAYS)
    return ValueStatistics(
        positions=int(numbers["positions"]),
        minimum=float(numbers["minimum"]),
        maximum=float(numbers["maximum"]),
        smallest_magnitude=float(numbers["smallest_magnitude"]),
        channel_amax=channel_amax,
        histogram=None if counts is None else Histogram(counts, float(numbers["bin_width"])),
        second_moment=second_moment,
    )
