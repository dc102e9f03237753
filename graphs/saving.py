"""Writes a graph whose weights are values, in memory or yet to be computed, with external data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["save_model", "weight_bytes"]

# Constants of shapes and axes stay in the graph's file.
_LARGEST_INLINE_BYTES = 256
# ONNX Runtime maps external data; offsets on page boundaries keep the mapping aligned.
_ALIGNMENT = 4096


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the weights that `save_model` writes as external data."""
    return sum(tensor.nbytes for _, tensor in _weights(model))


def save_model(model: ir.Model, path: Path, written: Callable[[int], None]) -> None:
    """Writes `path` and, if the graph has weights, `path` + ".data".

    Weights are written one after the other, so that of those which are computed when they are
    asked for only one is in memory. Their metadata is kept.

    Args:
        model: its weights become external tensors in place.
        path: the .onnx file to write; not one that the model's weights lie in.
        written: is told of each weight's bytes.

    Raises:
        OSError: if the disk is full or not writable; the caller removes what was written.
    """
    weights = _weights(model)
    if weights:
        name = f"{path.name}.data"
        tensors = [tensor for _, tensor in weights]
        external = ir.external_data.convert_tensors_to_external(
            tensors,
            path.parent,
            name,
            callback=lambda tensor, _: written(tensor.nbytes),
            alignment=_ALIGNMENT,
            align_threshold=_LARGEST_INLINE_BYTES,
        )
        for (value, tensor), placed in zip(weights, external, strict=True):
            placed.metadata_props.update(tensor.metadata_props)
            value.const_value = placed
    ir.save(model, path)


def _weights(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    return [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None and _is_weight(value.const_value)
    ]


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    """Anything large, every row of floats, and what lies in a file already, which is another one.

    TensorRT-RTX 1.7 refuses a graph with two LayerNormalizations of 32 channels whose weights lie
    in the graph's own file ("Weights of same values but of different counts").
    """
    is_row = tensor.dtype.is_floating_point() and len(tensor.shape) > 0
    is_placed = isinstance(tensor, ir.ExternalTensor)
    return is_row or is_placed or tensor.nbytes > _LARGEST_INLINE_BYTES
