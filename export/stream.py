"""Streams weights from a checkpoint into a graph's external data, a block of rows at a time.

No whole tensor is held: a block of the checkpoint's rows is read, cast, transposed if the recipe
says so, and written to its place in the file. Quantization later takes the same stream.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from vlmport.errors import ExportError
from vlmport.export.recipe import PlannedWeight, planned

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.export.tensor_store import TensorStore

__all__ = ["ByteProgress", "save_graph", "weight_bytes"]

# Large enough that a strided write of a transposed block is tens of KiB a row, small enough that
# the peak stays far under one embedding table.
_BLOCK_BYTES = 32 * 1024 * 1024
# ONNX Runtime maps external data; offsets on page boundaries keep the mapping aligned.
_ALIGNMENT = 4096


class ByteProgress(Protocol):
    """Is told how many bytes of weights were written."""

    def __call__(self, count: int, /) -> None:
        """Adds `count` bytes."""
        ...


@dataclass(frozen=True, slots=True)
class _Placed:
    """A planned weight and its place in the external data."""

    value: ir.Value
    weight: PlannedWeight
    offset: int


def weight_bytes(model: ir.Model) -> int:
    """Bytes that the planned weights of a graph will take in its external data."""
    return sum(weight.nbytes for _, weight in _planned_values(model))


def save_graph(model: ir.Model, path: Path, store: TensorStore, progress: ByteProgress) -> None:
    """Writes `path` and, if the graph has weights, `path` + ".data".

    Args:
        model: traced graph; its planned weights become external tensors in place.
        path: the .onnx file to write.
        store: the checkpoint's tensors under module parameter names.
        progress: is told of every block.

    Raises:
        ExportError: if a weight does not fit into float16.
        OSError: if the disk is full or not writable; the caller removes what was written.
    """
    data_path = path.with_name(path.name + ".data")
    placed = list(_placed(model))
    if placed:
        with data_path.open("wb", buffering=0) as file:
            for item in placed:
                _write_weight(file.fileno(), item, store, progress)
            file.truncate(placed[-1].offset + placed[-1].weight.nbytes)
    for item in placed:
        item.value.const_value = ir.ExternalTensor(
            data_path.name,
            item.offset,
            item.weight.nbytes,
            item.weight.dtype,
            shape=item.weight.shape,
            name=item.weight.name or "",
            base_dir=path.parent,
            metadata_props=dict(item.weight.metadata_props),
        )
    ir.save(model, path)


def _planned_values(model: ir.Model) -> Iterator[tuple[ir.Value, PlannedWeight]]:
    for value in model.graph.initializers.values():
        weight = planned(value)
        if weight is not None:
            yield value, weight


def _placed(model: ir.Model) -> Iterator[_Placed]:
    offset = 0
    for value, weight in _planned_values(model):
        yield _Placed(value, weight, offset)
        offset += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT


def _write_weight(
    descriptor: int, item: _Placed, store: TensorStore, progress: ByteProgress
) -> None:
    dtype = item.weight.dtype.numpy()
    recipe = item.weight.recipe
    row = 0  # of the concatenation of the sources
    for source in recipe.sources:
        for block in _row_blocks(store, source):
            cast = _cast(block, dtype, source)
            if recipe.transpose:
                _write_columns(descriptor, item, cast, row)
            else:
                row_bytes = item.weight.nbytes // max(item.weight.dims[:1], default=1)
                _write_all(descriptor, cast, item.offset + row * row_bytes)
            row += block.shape[0] if block.ndim else 1
            progress(cast.nbytes)


def _cast(block: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """The block in another element type, rounded to nearest, ties to even, as PyTorch does."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(block, dtype)
    if dtype == np.float16 and np.isinf(cast).any():
        largest = float(np.abs(block.astype(np.float64)).max())
        msg = (
            f"{name}: holds values up to {largest:.3g}; float16 ends at 65504; export with "
            "--precision bf16 or fp32"
        )
        raise ExportError(msg)
    return cast


def _row_blocks(store: TensorStore, name: str) -> Iterator[NDArray[Any]]:
    tensor = store.tensor(name)
    rows = tensor.shape[0] if tensor.shape else 1
    # Twice the stored bytes: a half-precision block doubles when it is cast to float32.
    row_bytes = max(1, tensor.nbytes // max(rows, 1)) * 2
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield store.read_rows(name, start, min(rows, start + step))


def _write_columns(descriptor: int, item: _Placed, block: NDArray[Any], column: int) -> None:
    """Writes block [rows, inner] as columns column:column+rows of the weight [inner, columns]."""
    columns = item.weight.dims[1]
    turned = np.ascontiguousarray(block.T)
    if columns == turned.shape[1]:
        _write_all(descriptor, turned, item.offset)
        return
    itemsize = turned.itemsize
    for inner, line in enumerate(turned):
        _write_all(descriptor, line, item.offset + (inner * columns + column) * itemsize)


def _write_all(descriptor: int, array: NDArray[Any], offset: int) -> None:
    view: memoryview = array.reshape(-1).view(np.uint8).data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
