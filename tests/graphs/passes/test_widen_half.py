from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from support.graph_cases import build
from support.weight_graphs import model_with

from vlmport.errors import GraphError
from vlmport.graphs.passes.widen_half import WidenHalfPass

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = """
g ({dtype}[B, 8] x, {dtype}[8, 4] w) => ({dtype}[B, 4] y, float[B, 4] logits)
{{
    product = MatMul(x, w)
    y = Tanh(product)
    logits = Cast<to = 1>(y)
}}
"""
CODES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@pytest.mark.parametrize("dtype", CODES)
def test_nothing_is_rounded_but_the_weights(dtype: str, tmp_path: Path) -> None:
    import onnxruntime

    generator = np.random.default_rng(0)
    kind = CODES[dtype].numpy()
    weight = generator.normal(size=(8, 4)).astype(kind)
    model = model_with(GRAPH.format(dtype=dtype), {"w": weight})
    assert WidenHalfPass()(model).modified
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {
        ir.DataType.FLOAT
    }
    assert model.graph.initializers["w"].dtype == CODES[dtype]
    path = tmp_path / "wide.onnx"
    ir.save(model, path)
    inputs = generator.normal(size=(3, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path))
    found, logits = session.run(None, {"x": inputs})
    expected = np.tanh(inputs @ weight.astype(np.float32))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(found))
    assert not WidenHalfPass()(ir.from_onnx_text(FLOAT)).modified


FLOAT = """<ir_version: 10, opset_import: ["" : 24]>
g (float[B] x) => (float[B] y) { y = Tanh(x) }"""


def test_casts_to_half_round_no_more() -> None:
    model = build("g (float[B] x) => (float[B] y) { h = Cast<to = 10>(x)\n y = Cast<to = 1>(h) }")
    assert WidenHalfPass()(model).modified
    assert [node.attributes["to"].as_int() for node in model.graph] == [1, 1]


def test_refuses_a_node_that_makes_half_of_its_own() -> None:
    model = build(
        "g (int64[1] n) => (float16[K] y) { y = ConstantOfShape<value = float16[1] {1}>(n) }"
    )
    with pytest.raises(GraphError, match="its attribute value is in half precision"):
        WidenHalfPass()(model)
