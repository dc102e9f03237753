"""Shapes and buffers as Python has them; TensorRT converts, but its types do not say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tensorrt as trt

    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["dims", "memory", "shape_of"]


def shape_of(tensor: trt.ITensor) -> tuple[int, ...]:
    """The lengths of a tensor's axes, -1 for one that is not fixed."""
    return tuple(int(length) for length in tensor.shape[:])


def dims(bindings: Bindings, shape: Sequence[int]) -> trt.Dims:
    """A shape for TensorRT."""
    return bindings.Dims(list(shape))


def memory(content: trt.IHostMemory) -> memoryview:
    """The bytes of what TensorRT serialized, as long as it is alive."""
    buffer: Any = content
    return memoryview(buffer)
