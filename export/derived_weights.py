"""Weights that are made of stored tensors, read in blocks of rows as if they were stored.

Each is a `WeightFile` of one tensor, so that streaming, matching and the PyTorch reference need no
case of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.export.tensor_store import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.export.tensor_store import WeightFile

__all__ = ["ComputedTensor", "LowRankSum", "RowRange", "split_fused_gates"]

# An opened file and a key in it.
Entry = tuple["WeightFile", str]


@dataclass(frozen=True, slots=True, eq=False)
class RowRange:
    """Some rows of a stored tensor.

    Attributes:
        source: the stored tensor.
        first: its first row that is taken.
        count: rows that are taken.
    """

    source: Entry
    first: int
    count: int

    @property
    def path(self) -> Path:
        """File of the source."""
        return self.source[0].path

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The one tensor, under the key of the source."""
        stored = _stored(self.source)
        return {self.source[1]: replace(stored, shape=(self.count, *stored.shape[1:]))}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the range, as stored."""
        return self.source[0].read_rows(name, self.first + start, self.first + stop)


@dataclass(frozen=True, slots=True, eq=False)
class ComputedTensor:
    """A small tensor that a function makes of a stored one; it is held whole while it is read.

    Attributes:
        source: the stored tensor.
        shape: of the result.
        compute: float32 array of the source -> float32 array of that shape.
    """

    source: Entry
    shape: tuple[int, ...]
    compute: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    @property
    def path(self) -> Path:
        """File of the source."""
        return self.source[0].path

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The one tensor, under the key of the source."""
        return {self.source[1]: StoredTensor(self.source[1], np.dtype(np.float32), self.shape)}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the result, float32."""
        whole = _rows(self.source, 0, _stored(self.source).shape[0])
        return self.compute(whole)[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class LowRankSum:
    """A matrix plus the product of two thin ones: W + scale * (up @ down), in float32.

    A block of rows needs the rows of W and `up` and the whole of `down`, which has few rows.

    Attributes:
        source: W, [outputs, inputs].
        down: [rank, inputs].
        up: [outputs, rank].
        scale: factor of the product.

    Source: Hu et al. 2021, "LoRA", section 4.1.
    """

    source: Entry
    down: Entry
    up: Entry
    scale: float

    @property
    def path(self) -> Path:
        """File of W."""
        return self.source[0].path

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The one tensor, under the key of W, in float32 whatever W is stored in."""
        stored = _stored(self.source)
        return {self.source[1]: replace(stored, dtype=np.dtype(np.float32))}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the sum, float32."""
        del name
        down = _rows(self.down, 0, _stored(self.down).shape[0])
        product = _rows(self.up, start, stop) @ down
        return _rows(self.source, start, stop) + product * np.float32(self.scale)


def split_fused_gates(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """Splits the fused first matrix of a SwiGLU feed-forward: gate above, values below.

    Source: transformers/conversion_mapping.py, "Dinov2Model" (Chunk of mlp.weights_in).
    """
    entries: dict[str, Entry] = {}
    for name, entry in found.items():
        fused = re.search(r"\.mlp\.weights_in\.(weight|bias)$", name)
        if fused is None:
            entries[name] = entry
            continue
        half = _stored(entry).shape[0] // 2
        for index, part in enumerate(("gate_proj", "up_proj")):
            target = name[: fused.start()] + f".mlp.{part}.{fused.group(1)}"
            entries[target] = (RowRange(entry, index * half, half), entry[1])
    return entries


def _stored(entry: Entry) -> StoredTensor:
    return entry[0].tensors[entry[1]]


def _rows(entry: Entry, start: int, stop: int) -> NDArray[np.float32]:
    return entry[0].read_rows(entry[1], start, stop).astype(np.float32)
