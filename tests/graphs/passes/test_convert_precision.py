from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from support.graph_cases import build, operators
from support.graph_runs import run_whole

from vlmport.errors import GraphError
from vlmport.export.recipe import RECIPE_KEY
from vlmport.graphs.passes.convert_precision import ConvertPrecisionPass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LAYER = """
g (float[2, 8] x) => (float[8, 2] y, float[2, 8] logits)
{
    product = MatMul(x, weight)
    sum = Add(product, offset)
    turned = Transpose(sum)
    y = Neg(turned)
    logits = Mul(sum, offset)
}
"""
WEIGHT = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
OFFSET = np.full(8, 1e-5, np.float32)


def layer(text: str = LAYER) -> ir.Model:
    """MatMul of a parameter, and a constant that float16 does not hold exactly."""
    model = build(
        text.replace("(float[2, 8] x)", "(float[2, 8] x, float[8, 8] weight, float[8] offset)")
    )
    for name, array in (("weight", WEIGHT), ("offset", OFFSET)):
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers.add(value)
    tensor = model.graph.initializers["weight"].const_value
    assert tensor is not None
    tensor.metadata_props[RECIPE_KEY] = "proj.weight | cast FLOAT"
    return model


def named(model: ir.Model, value: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == value)


def inputs() -> dict[str, NDArray[np.float32]]:
    return {"x": np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)}


def test_all_of_a_graph_becomes_half() -> None:
    model = layer()
    assert ConvertPrecisionPass("FLOAT16")(model).modified
    assert operators(model)["Cast"] == 0
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    assert {value.dtype for value in values} == {ir.DataType.FLOAT16}
    tensor = model.graph.initializers["weight"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert tensor.metadata_props[RECIPE_KEY] == "proj.weight | cast FLOAT16"
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT.astype(np.float16))


def test_ports_that_stay_are_cast_at_the_border(tmp_path: Path) -> None:
    expected = run_whole(layer(), inputs(), tmp_path)
    model = layer()
    ConvertPrecisionPass("FLOAT16", float32_ports={"x", "y", "logits"})(model)
    assert operators(model)["Cast"] == 3
    found = run_whole(model, inputs(), tmp_path)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=2e-2, atol=4e-3)


def test_a_kept_node_reads_a_cast_up_and_writes_a_cast_down(tmp_path: Path) -> None:
    model = layer()
    ConvertPrecisionPass("FLOAT16", {named(model, "sum")}, {"logits"})(model)
    # Up: product and none of the constant, which is stored twice. Down: sum, once for both readers
    # (the move follows the kept node, so its cast stands behind it).
    kept = named(model, "sum")
    assert {value.dtype for value in kept.inputs if value} == {ir.DataType.FLOAT}
    turned = named(model, "turned")
    assert turned.inputs[0] is kept.outputs[0]
    constants = model.graph.initializers
    assert constants["offset"].dtype == ir.DataType.FLOAT
    assert constants["offset.float16"].dtype == ir.DataType.FLOAT16
    run_whole(model, inputs(), tmp_path)


def test_no_two_casts_undo_each_other() -> None:
    for kept in ("product", "sum", "turned", "y", "logits"):
        model = layer()
        ConvertPrecisionPass("BFLOAT16", {named(model, kept)}, {"x"})(model)
        for node in model.graph:
            maker = node.inputs[0].producer() if node.inputs[0] is not None else None
            assert not (node.op_type == "Cast" and maker is not None and maker.op_type == "Cast")


def test_a_parameter_of_a_kept_node_is_stored_half_and_cast_up(tmp_path: Path) -> None:
    model = layer()
    ConvertPrecisionPass("FLOAT16", {named(model, "product")}, {"x", "y", "logits"})(model)
    assert model.graph.initializers["weight"].dtype == ir.DataType.FLOAT16
    product = named(model, "product")
    assert product.inputs[1] is not None
    assert product.inputs[1].dtype == ir.DataType.FLOAT
    run_whole(model, inputs(), tmp_path)


def test_a_parameter_beyond_half_stays_float32(tmp_path: Path) -> None:
    model = layer()
    kept = {named(model, "product")}
    ConvertPrecisionPass("FLOAT16", kept, {"x", "y", "logits"}, {"weight"})(model)
    assert model.graph.initializers["weight"].dtype == ir.DataType.FLOAT
    run_whole(model, inputs(), tmp_path)


def test_a_graph_without_floats_is_left_alone() -> None:
    model = build("g (int64[2] x) => (int64[2] y) { y = Neg(x) }")
    assert not ConvertPrecisionPass("FLOAT16")(model).modified


def test_a_graph_inside_a_node_is_refused() -> None:
    text = """
g (float[2] x, bool c) => (float[2] y)
{
    y = If(c) <then_branch = a () => (float[2] p) { p = Neg(x) },
               else_branch = b () => (float[2] q) { q = Abs(x) }>
}
"""
    with pytest.raises(GraphError, match="holds a graph of its own"):
        ConvertPrecisionPass("FLOAT16")(build(text))


def test_attention_over_a_float32_cache_stays_float32() -> None:
    text = """
g (float[1, 2, 1, 8] q, float[1, 2, 1, 8] k, float[1, 2, 4, 8] past, int64[1] at)
    => (float[1, 2, 1, 8] y, float[1, 2, 4, 8] present)
{
    present = TensorScatter<axis = 2>(past, k, at)
    y = Attention(q, present, present)
}
"""
    model = build(text)
    ConvertPrecisionPass("FLOAT16", float32_ports={"past", "present"})(model)
    # Cast: q and k up, y down; never the cache.
    assert operators(model)["Cast"] == 3
    scatter = named(model, "present")
    assert scatter.inputs[0] is model.graph.inputs[2]
    assert named(model, "y.float").inputs[1] is scatter.outputs[0]
