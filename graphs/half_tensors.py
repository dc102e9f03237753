"""Weights in half precision, cast when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["HALF_LIMITS", "HalfLimits", "HalfType", "magnitudes", "narrowed"]

HalfType = Literal["FLOAT16", "BFLOAT16"]
_BLOCK = 1 << 22  # elements that are looked at together: 16 MiB of float32


@dataclass(frozen=True, slots=True)
class HalfLimits:
    """What a half-precision type can hold (IEEE 754 binary16; bfloat16 as binary32's upper half).

    Attributes:
        largest: largest finite magnitude.
        smallest_normal: smallest magnitude with all digits.
        smallest: smallest magnitude that is not 0.
    """

    largest: float
    smallest_normal: float
    smallest: float


HALF_LIMITS: dict[HalfType, HalfLimits] = {
    "FLOAT16": HalfLimits(65504.0, 2.0**-14, 2.0**-24),
    "BFLOAT16": HalfLimits(float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-133),
}


def narrowed(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.LazyTensor:
    """The tensor rounded to nearest, ties to even, computed anew whenever it is asked for.

    A recipe beside it stays; only its last step, the cast, names the new type.
    """
    cast_from, cast_to = f"cast {ir.DataType.FLOAT.name}", f"cast {dtype.name}"
    metadata = {k: v.replace(cast_from, cast_to) for k, v in tensor.metadata_props.items()}

    def cast() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=tensor.name)

    return ir.LazyTensor(
        cast,
        dtype=dtype,
        shape=ir.Shape(tuple(tensor.shape.numpy())),
        name=tensor.name,
        metadata_props=metadata,
    )


def magnitudes(tensor: ir.TensorProtocol) -> tuple[float, float]:
    """Largest finite |x|, and smallest |x| > 0 (infinity if there is none).

    Read in blocks of 16 MiB. An infinity is one in half precision too.
    """
    largest, smallest = 0.0, float("inf")
    for block in _blocks(tensor.numpy()):
        absolute = np.abs(block)
        absolute = absolute[np.isfinite(absolute)]
        largest = max(largest, float(absolute.max(initial=0.0)))
        absolute[absolute == 0] = np.inf
        smallest = min(smallest, float(absolute.min(initial=np.inf)))
    return largest, smallest


def _blocks(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]
