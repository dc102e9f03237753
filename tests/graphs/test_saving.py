from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlmport.export.recipe import RECIPE_KEY
from vlmport.graphs.saving import save_model, weight_bytes

ARRAYS: dict[str, NDArray[Any]] = {
    "large": np.arange(4096, dtype=np.float32),
    "row": np.arange(8, dtype=np.float32),
    "codes": np.arange(8, dtype=np.int8),
    "scalar": np.array(3.0, np.float32),
}


def graph(lazily: bool) -> ir.Model:
    values = []
    for name, array in ARRAYS.items():
        tensor: ir.TensorProtocol = ir.tensor(array, name=name)
        if lazily:
            tensor = ir.LazyTensor(
                partial(ir.tensor, array, name=name),
                dtype=tensor.dtype,
                shape=ir.Shape(array.shape),
                name=name,
                metadata_props={RECIPE_KEY: f"{name} | cast"},
            )
        values.append(ir.Value(name=name, const_value=tensor))
        values[-1].shape, values[-1].type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    node = ir.node("Identity", [values[0]])
    node.outputs[0].name = "y"
    made = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 24})
    return ir.Model(made, ir_version=11)


def plain(array: NDArray[Any]) -> list[float]:
    return [float(element) for element in array.reshape(-1)]


EXPECTED = {name: plain(array) for name, array in ARRAYS.items()}


def arrays(path: Path) -> dict[str, list[float]]:
    loaded = ir.load(path).graph.initializers
    tensors = {name: loaded[name].const_value for name in ARRAYS}
    return {name: plain(tensor.numpy()) for name, tensor in tensors.items() if tensor is not None}


def test_weights_and_their_metadata_come_back(tmp_path: Path) -> None:
    model = graph(lazily=True)
    written: list[int] = []
    size = weight_bytes(model)
    save_model(model, tmp_path / "a.onnx", written.append)
    assert arrays(tmp_path / "a.onnx") == EXPECTED
    assert sum(written) == size == 4096 * 4 + 8 * 4
    found = ir.load(tmp_path / "a.onnx").graph.initializers["large"].const_value
    assert found is not None
    assert found.metadata_props[RECIPE_KEY] == "large | cast"


def test_small_tensors_of_another_file_are_written_again(tmp_path: Path) -> None:
    model = graph(lazily=False)
    (tmp_path / "b").mkdir()
    placed = list(model.graph.initializers.values())
    external = ir.external_data.convert_tensors_to_external(
        [value.const_value for value in placed if value.const_value], tmp_path, "old.data"
    )
    for value, tensor in zip(placed, external, strict=True):
        value.const_value = tensor
    save_model(model, tmp_path / "b" / "a.onnx", lambda _: None)
    (tmp_path / "old.data").unlink()
    assert arrays(tmp_path / "b" / "a.onnx") == EXPECTED
