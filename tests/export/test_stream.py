from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from ml_dtypes import bfloat16
from onnx import numpy_helper
from support.graph_cases import array_store, build

from vlmport.errors import ExportError
from vlmport.export import stream
from vlmport.export.recipe import RECIPE_KEY, PlannedWeight, WeightRecipe

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RNG = np.random.default_rng(0)
SOURCES: dict[str, NDArray[Any]] = {
    "q": RNG.normal(size=(37, 8)).astype(np.float16),
    "k": RNG.normal(size=(5, 8)).astype(np.float32),
    "bias": RNG.normal(size=37).astype(np.float16),
}


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (WeightRecipe(("q",)), SOURCES["q"]),
        (WeightRecipe(("q",), transpose=True), SOURCES["q"].T),
        (WeightRecipe(("q", "k")), np.concatenate([SOURCES["q"], SOURCES["k"]])),
        (WeightRecipe(("q", "k"), transpose=True), np.vstack([SOURCES["q"], SOURCES["k"]]).T),
        (WeightRecipe(("bias",)), SOURCES["bias"]),
    ],
)
def test_written_weight_is_what_the_recipe_says_for_any_block_size(
    recipe: WeightRecipe,
    expected: NDArray[Any],
    block_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "_BLOCK_BYTES", block_bytes)
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    weight = PlannedWeight("w", ir.DataType.FLOAT, expected.shape, recipe)
    value = ir.Value(
        name="w",
        shape=ir.Shape(expected.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=weight,
    )
    model.graph.initializers.add(value)
    counted: list[int] = []
    assert stream.weight_bytes(model) == expected.size * 4
    stream.save_graph(model, tmp_path / "m.onnx", array_store(SOURCES), counted.append)
    written = onnx.load(tmp_path / "m.onnx").graph.initializer[0]
    np.testing.assert_array_equal(
        numpy_helper.to_array(written, str(tmp_path)), expected.astype(np.float32)
    )
    assert sum(counted) == expected.size * 4
    recorded = {entry.key: entry.value for entry in written.metadata_props}
    assert recorded[RECIPE_KEY] == recipe.describe("FLOAT")


def test_planned_values_cannot_be_read_by_mistake() -> None:
    weight = PlannedWeight("w", ir.DataType.FLOAT, (2, 2), WeightRecipe(("w",)))
    with pytest.raises(AssertionError, match="before they were streamed"):
        weight.numpy()


def streamed(array: NDArray[Any], dtype: ir.DataType, folder: Path) -> NDArray[Any]:
    """What is written of a weight that the checkpoint stores as `array`."""
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    value = ir.Value(name="w", shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    value.const_value = PlannedWeight("w", dtype, array.shape, WeightRecipe(("w",)))
    model.graph.initializers.add(value)
    stream.save_graph(model, folder / "m.onnx", array_store({"w": array}), lambda _: None)
    raw = (folder / "m.onnx.data").read_bytes()
    return np.frombuffer(raw, dtype.numpy()).reshape(array.shape)


# Every value of 16 bits, infinities and numbers that are none among them.
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(np.float16, ir.DataType.FLOAT16), (bfloat16, ir.DataType.BFLOAT16)],
)
def test_a_weight_stored_in_half_precision_keeps_its_bits(
    stored: Any, dtype: ir.DataType, tmp_path: Path
) -> None:
    values = PATTERNS.view(stored)
    if dtype == ir.DataType.FLOAT16:  # an infinity is refused
        values = values[~np.isinf(values)]
    found = streamed(values, dtype, tmp_path)
    np.testing.assert_array_equal(found.view(np.uint16), values.view(np.uint16))


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(ir.DataType.FLOAT16, torch.float16), (ir.DataType.BFLOAT16, torch.bfloat16)],
)
def test_float32_weights_are_rounded_as_pytorch_rounds(
    dtype: ir.DataType, target: torch.dtype, tmp_path: Path
) -> None:
    values = RNG.normal(size=4096).astype(np.float32) * np.float32(2.0) ** RNG.integers(
        -30, 12, 4096
    )
    values = np.concatenate([values, 1 + np.arange(64, dtype=np.float32) / 4096])  # ties among them
    found = streamed(values.astype(np.float32), dtype, tmp_path)
    expected = torch.from_numpy(values.astype(np.float32)).to(target)
    np.testing.assert_array_equal(found.astype(np.float32), expected.float().numpy())


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"w: holds values up to 7e\+04; float16 ends at 65504"):
        streamed(np.array([1.0, -7e4], np.float32), ir.DataType.FLOAT16, tmp_path)
