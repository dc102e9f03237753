from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.graph_cases import operators
from support.weight_graphs import fused_operators, model_with, run_file, save

from vlmport.errors import GraphError
from vlmport.export.recipe import RECIPE_KEY
from vlmport.graphs.passes.dequantize_weight import dequantize_weight_

MATMUL = "g (float[n, 64] x, float[64, 24] w) => (float[n, 24] y) { y = MatMul(x, w) }"
GEMM = """g (float[n, 64] x, float[24, 64] w, float[24] b) => (float[n, 24] y)
    { y = Gemm <transB = 1> (x, w, b) }"""
HEAD = "g (float[n, 64] x, float[24, 64] w) => (float[n, 24] y) { y = Gemm <transB = 1> (x, w) }"
BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}
FORMS = pytest.mark.parametrize(
    ("dtype", "blocks"),
    [(ir.DataType.INT8, 1), (ir.DataType.INT4, 1), (ir.DataType.INT4, 2)],
    ids=["int8 per channel", "int4 one block", "int4 two blocks"],
)


def quantized(dtype: ir.DataType, blocks: int, scale_type: Any) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    top = 2 ** (BITS[dtype] - 1)
    values = generator.integers(-top, top, (64, 24)).astype(np.int8)
    return values, generator.uniform(0.01, 0.1, (blocks, 24)).astype(scale_type)


@FORMS
@pytest.mark.parametrize("body", [MATMUL, GEMM, HEAD], ids=["MatMul", "Gemm", "head"])
def test_output_is_that_of_the_integers_times_the_scale(
    body: str, dtype: ir.DataType, blocks: int, tmp_path: Path
) -> None:
    values, scale = quantized(dtype, blocks, np.float32)
    bias = np.random.default_rng(1).normal(size=24).astype(np.float32)
    shape = (64, 24) if body == MATMUL else (24, 64)
    model = model_with(body, {"w": np.zeros(shape, np.float32), "b": bias})
    dequantize_weight_(model, next(iter(model.graph)), values, scale, dtype)
    path = save(model, tmp_path)
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    weight = values * np.repeat(scale, 64 // blocks, axis=0).astype(np.float64)
    expected = x @ weight + (bias if body == GEMM else 0)
    (y,) = run_file(path, {"x": x})
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    assert model.graph.outputs[0].name == "y"
    assert "w" not in model.graph.initializers
    fused = fused_operators(path, tmp_path)
    assert (fused["MatMulNBits"], fused["DequantizeLinear"]) == (1, 0), fused


def test_int4_takes_half_a_byte_and_survives_the_file(tmp_path: Path) -> None:
    values, scale = quantized(ir.DataType.INT4, 2, np.float32)
    model = model_with(MATMUL, {"w": np.zeros((64, 24), np.float32)})
    dequantize_weight_(model, next(iter(model.graph)), values, scale, ir.DataType.INT4)
    weight = model.graph.initializers["w.int4"].const_value
    assert weight is not None
    assert weight.nbytes == 64 * 24 // 2
    loaded = ir.load(save(model, tmp_path)).graph.initializers["w.int4"].const_value
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy().astype(np.int8), values)


def test_an_odd_number_of_int4_weights_is_packed() -> None:
    values = np.array([[-8], [7], [3]], np.int8)
    body = "g (float[n, 3] x, float[3, 1] w) => (float[n, 1] y) { y = MatMul(x, w) }"
    model = model_with(body, {"w": np.zeros((3, 1), np.float32)})
    scale = np.ones((1, 1), np.float32)
    dequantize_weight_(model, next(iter(model.graph)), values, scale, ir.DataType.INT4)
    weight = model.graph.initializers["w.int4"].const_value
    assert weight is not None
    assert weight.nbytes == 2
    np.testing.assert_array_equal(weight.numpy().astype(np.int8), values)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_scale_and_product_are_of_the_graph_s_type(half: str, tmp_path: Path) -> None:
    dtype = ir.DataType.FLOAT16 if half == "float16" else ir.DataType.BFLOAT16
    values, scale = quantized(ir.DataType.INT4, 2, dtype.numpy())
    model = model_with(
        MATMUL.replace("float[", f"{half}["), {"w": np.zeros((64, 24), dtype.numpy())}
    )
    dequantize_weight_(model, next(iter(model.graph)), values, scale, ir.DataType.INT4)
    save(model, tmp_path)
    assert model.graph.initializers["w.scale"].dtype == dtype
    assert {node.outputs[0].dtype for node in model.graph} == {dtype}


def test_names_and_recipe_tell_where_the_weight_came_from() -> None:
    values, scale = quantized(ir.DataType.INT4, 2, np.float32)
    model = model_with(HEAD, {"w": np.zeros((24, 64), np.float32)})
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    weight.metadata_props[RECIPE_KEY] = "lm_head.weight | cast FLOAT"
    dequantize_weight_(model, next(iter(model.graph)), values, scale, ir.DataType.INT4)
    assert set(model.graph.initializers) == {"w.int4", "w.scale"}
    made = model.graph.initializers["w.int4"].const_value
    assert made is not None
    recipe = "lm_head.weight | cast FLOAT | transpose | int4 block 32"
    assert made.metadata_props[RECIPE_KEY] == recipe
    assert operators(model) == {"DequantizeLinear": 1, "MatMul": 1}


def test_a_weight_that_others_read_stays_for_them() -> None:
    body = """g (float[n, 64] x, float[64, 24] w) => (float[n, 24] y, float[64, 24] v)
        { y = MatMul(x, w) v = Neg(w) }"""
    values, scale = quantized(ir.DataType.INT8, 1, np.float32)
    model = model_with(body, {"w": np.zeros((64, 24), np.float32)})
    dequantize_weight_(model, next(iter(model.graph)), values, scale, ir.DataType.INT8)
    assert set(model.graph.initializers) == {"w", "w.int8", "w.scale"}


@pytest.mark.parametrize("attribute", ["alpha = 2.0", "beta = 0.5", "transA = 1"])
def test_a_gemm_that_does_more_is_refused(attribute: str) -> None:
    body = GEMM.replace("transB = 1", f"transB = 1, {attribute}").replace("[n, 64]", "[64, 64]")
    model = model_with(body.replace("[n, 24]", "[64, 24]"), {"w": np.zeros((24, 64), np.float32)})
    values, scale = quantized(ir.DataType.INT8, 1, np.float32)
    with pytest.raises(GraphError, match="leave the layer float"):
        dequantize_weight_(model, next(iter(model.graph)), values, scale, ir.DataType.INT8)
