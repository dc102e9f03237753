"""Element types by their names, and where fields lie in a block of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ALIGNMENT", "Field", "in_words", "itemsize", "lay_out", "size_of"]

# What cudaMalloc aligns to, and what TensorRT may expect of a tensor's address.
ALIGNMENT = 256
_ITEM_SIZES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
}


def itemsize(dtype: str) -> int:
    """Bytes of an element; numpy knows no bfloat16."""
    return _ITEM_SIZES[dtype]


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return itemsize(dtype) * math.prod(shape)


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor in a block of memory.

    Attributes:
        offset: bytes from the beginning of the block.
        dtype: numpy's name of the element type, or "bfloat16".
        shape: lengths of its axes.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return size_of(self.dtype, self.shape)


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Field], int]:
    """Places tensors one behind the other, each aligned.

    Args:
        tensors: name -> element type and shape.

    Returns:
        Name -> place, and the bytes of the whole block.
    """
    fields, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        fields[name] = Field(end, dtype, shape)
        end += -(-fields[name].size // ALIGNMENT) * ALIGNMENT
    return fields, max(end, ALIGNMENT)


def in_words(size: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
