"""Reads single tensors, or rows of them, from a checkpoint's weight files.

Safetensors are read with plain file reads and never memory-mapped: mapped pages count as resident
memory of the process, and an 8B checkpoint would then show its whole size as the export's peak.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from vlmport.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["PickleFile", "SafetensorsFile", "StoredTensor", "TensorStore", "open_weight_file"]

# The format's own names, https://huggingface.co/docs/safetensors (section "Format").
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The reference reader refuses larger headers too; a damaged length field must not ask for memory.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a weight file, not yet read.

    Attributes:
        name: key in the file.
        dtype: element type as stored.
        shape: lengths of the axes.
        offset: first byte in the file; 0 where the reader does not work by offsets.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile(Protocol):
    """One file of weights."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors of the file by key."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the first axis, as stored; a scalar counts as one row."""
        ...


class SafetensorsFile:
    """A .safetensors file.

    Raises:
        CheckpointError: if the file is truncated, its header is damaged, or a tensor has a type
            that is not known.

    Source: https://huggingface.co/docs/safetensors (section "Format").
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = _read_header(path)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the first axis, as stored; a scalar counts as one row."""
        tensor = self.tensors[name]
        rows = tensor.shape[0] if tensor.shape else 1
        row_bytes = tensor.nbytes // max(rows, 1)
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        array = np.empty(shape, tensor.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start * row_bytes)
            view: memoryview = array.reshape(-1).view(np.uint8).data
            while view:
                count = file.readinto(view)
                if not count:
                    msg = f"{self.path}: the data of {name!r} ends early; download the file again"
                    raise CheckpointError(msg)
                view = view[count:]
        return array


class PickleFile:
    """A pytorch_model.bin, opened with `torch.load(weights_only=True, mmap=True)`.

    Raises:
        CheckpointError: if torch refuses the file (damaged, or it holds more than tensors).
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            state: dict[str, torch.Tensor] = torch.load(
                path, map_location="cpu", weights_only=True, mmap=True
            )
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ...
            msg = (
                f"{path}: torch.load(weights_only=True) refuses it ({str(error).splitlines()[0]}); "
                "expected a zip-format state dict of tensors; download the file again or convert "
                "it to safetensors"
            )
            raise CheckpointError(msg) from error
        self._state = state
        self.tensors: dict[str, StoredTensor] = {
            name: StoredTensor(name, _numpy_dtype(value), tuple(value.shape))
            for name, value in state.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the first axis, as stored; a scalar counts as one row."""
        tensor = self._state[name]
        rows = tensor[start:stop] if tensor.ndim else tensor
        raw = rows.contiguous().flatten().view(_torch_bytes()).numpy()
        array: NDArray[Any] = raw.view(self.tensors[name].dtype).reshape(tuple(rows.shape))
        return array


@dataclass(frozen=True, slots=True)
class TensorStore:
    """Tensors of several files under the names that the exported modules use.

    Attributes:
        entries: module parameter name -> (file, key in that file).
    """

    entries: Mapping[str, tuple[WeightFile, str]]

    def tensor(self, name: str) -> StoredTensor:
        """Describes the tensor without reading it."""
        file, key = self.entries[name]
        return file.tensors[key]

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the first axis, as stored."""
        file, key = self.entries[name]
        return file.read_rows(key, start, stop)

    def read(self, name: str) -> NDArray[Any]:
        """The whole tensor, as stored."""
        shape = self.tensor(name).shape
        return self.read_rows(name, 0, shape[0] if shape else 1)


def open_weight_file(path: Path) -> WeightFile:
    """Opens a file of weights by its ending: .safetensors, or .bin/.pt for a pickled state dict."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return PickleFile(path)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            _check_header_length(length, size)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _describe(name, entry, 8 + length) for name, entry in header.items()}
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); check that the file is there"
        raise CheckpointError(msg) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path}: not a valid safetensors file ({error}); download it again"
        raise CheckpointError(msg) from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end > size:
        msg = (
            f"{path}: truncated: found {size} bytes, its header describes {end}; "
            "download the file again"
        )
        raise CheckpointError(msg)
    return tensors


def _check_header_length(length: int, size: int) -> None:
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        msg = f"a header of {length} bytes in a file of {size} bytes"
        raise ValueError(msg)


def _describe(name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        msg = f"tensor {name!r} has type {entry['dtype']}; readable are {', '.join(_DTYPES)}"
        raise ValueError(msg)
    begin, end = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    tensor = StoredTensor(name, _DTYPES[entry["dtype"]], shape, data_start + begin)
    if begin < 0 or min(shape, default=1) < 0 or end - begin != tensor.nbytes:
        msg = f"tensor {name!r} of shape {shape} has {end - begin} bytes, expected {tensor.nbytes}"
        raise ValueError(msg)
    return tensor


def _numpy_dtype(tensor: Any) -> np.dtype[Any]:  # torch.Tensor; torch is imported lazily
    name = str(tensor.dtype).removeprefix("torch.")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _torch_bytes() -> Any:  # torch.dtype; torch is imported lazily
    import torch

    return torch.uint8
