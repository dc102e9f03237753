from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from support.graph_cases import array_store, build

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
