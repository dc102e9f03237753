"""Builds, runs and counts small graphs for the tests of passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

from vlmport.export.recipe import PlannedWeight, WeightRecipe
from vlmport.export.stream import save_graph
from vlmport.export.tensor_store import StoredTensor, TensorStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["ArrayFile", "array_store", "build", "operators", "plan_weights", "run"]


@dataclass
class ArrayFile:
    """Stands for a file of weights that is held in memory."""

    arrays: Mapping[str, NDArray[Any]]
    path: Path = Path("memory")
    tensors: dict[str, StoredTensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {
            name: StoredTensor(name, array.dtype, array.shape)
            for name, array in self.arrays.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        array = self.arrays[name]
        return array[start:stop] if array.ndim else array


def array_store(arrays: Mapping[str, NDArray[Any]]) -> TensorStore:
    file = ArrayFile(arrays)
    return TensorStore({name: (file, name) for name in arrays})


def build(body: str) -> ir.Model:
    """A model of opset 24 from ONNX's text form of its graph, shapes inferred as in a trace."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 24]>\n{body}')
    ShapeInferencePass()(model)
    return model


def plan_weights(model: ir.Model, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Turns graph inputs of these names into planned weights, as a trace leaves them."""
    for value in [value for value in model.graph.inputs if value.name in arrays]:
        model.graph.inputs.remove(value)
        name = str(value.name)
        recipe = WeightRecipe((name,))
        value.const_value = PlannedWeight(name, ir.DataType.FLOAT, arrays[name].shape, recipe)
        model.graph.initializers.add(value)


def run(
    model: ir.Model,
    inputs: Mapping[str, NDArray[Any]],
    folder: Path,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> list[NDArray[Any]]:
    """Writes a copy of the model and runs it with ONNX Runtime."""
    copy = model.clone()
    path = folder / f"model{len(list(folder.iterdir()))}.onnx"
    save_graph(copy, path, array_store(weights or {}), lambda _: None)
    session = onnxruntime.InferenceSession(str(path))
    return [np.asarray(output) for output in session.run(None, dict(inputs))]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)
