"""Adds small constants to a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["add_integers"]


def add_integers(model: ir.Model, name: str, values: Sequence[int]) -> ir.Value:
    """Adds an initializer int64 [len(values)] of that name and returns it."""
    constant = ir.Value(
        name=name,
        shape=ir.Shape([len(values)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array(values, np.int64), name=name),
    )
    model.graph.initializers.add(constant)
    return constant
