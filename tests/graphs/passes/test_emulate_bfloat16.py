from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support.graph_cases import build, operators

from vlmport.errors import GraphError
from vlmport.graphs.passes.emulate_bfloat16 import EmulateBfloat16Pass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CHAIN = """
g (float[2, 8] pixels, bfloat16[8, 8] weight) => (bfloat16[8, 2] y, float[2, 8] logits)
{
    x = Cast<to = 16>(pixels)
    product = MatMul(x, weight)
    sum = Add(product, x)
    y = Transpose(sum)
    logits = Cast<to = 1>(sum)
}
"""


def run(model: ir.Model, inputs: dict[str, NDArray[Any]], folder: Path) -> list[NDArray[Any]]:
    ir.save(model, folder / "m.onnx")
    session = onnxruntime.InferenceSession(folder / "m.onnx")
    return [np.asarray(result) for result in session.run(None, inputs)]


def is_bfloat16(array: NDArray[np.float32]) -> bool:
    return bool((array.astype(ml_dtypes.bfloat16).astype(np.float32) == array).all())


def test_the_graph_as_it_is_does_not_run_here(tmp_path: Path) -> None:
    """The reason for the pass: when this fails, ONNX Runtime's CPU provider has learnt bfloat16."""
    ir.save(build(CHAIN), tmp_path / "m.onnx")
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(tmp_path / "m.onnx")


def test_gives_the_numbers_of_pytorch_in_bfloat16(tmp_path: Path) -> None:
    model = build(CHAIN)
    assert EmulateBfloat16Pass()(model).modified
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(2, 8)).astype(np.float32)
    stored = generator.normal(size=(8, 8)).astype(ml_dtypes.bfloat16)
    found = run(model, {"pixels": pixels, "weight": stored.astype(np.float32)}, tmp_path)
    x = torch.from_numpy(pixels).bfloat16()
    expected = (x @ torch.from_numpy(stored.astype(np.float32)).bfloat16() + x).float().numpy()
    np.testing.assert_array_equal(found[1], expected)
    np.testing.assert_array_equal(found[0], expected.T)


def test_rounds_every_result_and_what_only_moves_not_at_all(tmp_path: Path) -> None:
    model = build(CHAIN.replace("float[2, 8] logits)", "float[2, 8] logits, bfloat16[2, 8] x)"))
    EmulateBfloat16Pass()(model)
    # pixels -> x, the product and the sum are rounded; the transposition is not.
    assert operators(model)["Cast"] == 2 + 3 * 2
    generator = np.random.default_rng(1)
    inputs = {
        "pixels": generator.normal(size=(2, 8)).astype(np.float32),
        "weight": generator.normal(size=(8, 8)).astype(np.float32),
    }
    results = run(model, inputs, tmp_path)
    assert all(result.dtype == np.float32 and is_bfloat16(result) for result in results)
    assert not is_bfloat16(inputs["pixels"])


def test_weights_stay_bfloat16_and_are_widened_once(tmp_path: Path) -> None:
    model = build(CHAIN)
    value = model.graph.inputs.pop()
    array = np.eye(8, dtype=ml_dtypes.bfloat16)
    value.const_value = ir.tensor(array, dtype=ir.DataType.BFLOAT16, name="weight")
    model.graph.initializers.add(value)
    EmulateBfloat16Pass()(model)
    assert model.graph.initializers["weight"].dtype == ir.DataType.BFLOAT16
    assert len(list(model.graph.initializers["weight"].uses())) == 1
    pixels = np.full((2, 8), 0.5, np.float32)
    np.testing.assert_array_equal(run(model, {"pixels": pixels}, tmp_path)[1], 2 * pixels)


def test_a_float32_graph_is_left_alone() -> None:
    model = build("g (float[2, 8] x) => (float[2, 8] y) { y = Tanh(x) }")
    assert not EmulateBfloat16Pass()(model).modified
    assert operators(model) == {"Tanh": 1}


def test_a_value_without_a_type_is_an_error() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 24, "own" : 1]>\n'
        "g (bfloat16[2] x) => (bfloat16[2] y) { z = own.Strange(x)\n y = Neg(z) }"
    )
    with pytest.raises(GraphError, match=r"Strange .*: its output 'z' has no element type"):
        EmulateBfloat16Pass()(model)
