from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from support.graph_cases import build, operators, run

from vlmport.graphs.passes.fuse_tanh_gelu import FuseTanhGeluPass

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = """
g (float[B, 8] x) => (float[B, 8] y)
<float half = {{0.5}}, float three = {{3.0}}, float cubic = {{{cubic}}}, float root = {{0.7978846}},
 float one = {{1.0}}>
{{
    halved = Mul(x, half)
    cube = Pow(x, three)
    small = Mul(cube, cubic)
    inner = Add(x, small)
    scaled = Mul(inner, root)
    bent = Tanh(scaled)
    gate = Add(bent, one)
    y = Mul(halved, gate)
}}
"""


def test_fuses_once_and_keeps_the_output(tmp_path: Path) -> None:
    model = build(GRAPH.format(cubic=0.044715))
    inputs = {"x": np.linspace(-4, 4, 16, dtype=np.float32).reshape(2, 8)}
    before = run(model, inputs, tmp_path)
    assert FuseTanhGeluPass()(model).modified
    assert operators(model) == {"Gelu": 1}
    np.testing.assert_allclose(run(model, inputs, tmp_path)[0], before[0], atol=1e-6)


def test_refuses_with_a_reason_when_a_factor_is_another() -> None:
    model = build(GRAPH.format(cubic=0.05))
    assert [r.reason for r in FuseTanhGeluPass().explain(model)] == ["a factor is not 0.044715"]
    assert not FuseTanhGeluPass()(model).modified


def half_model(cubic: float, dtype: ir.DataType) -> ir.Model:
    """The same in half precision, the factors rounded, as a trace gives it."""
    model = build(GRAPH.format(cubic=cubic))
    for value in (*model.graph.inputs, *(node.outputs[0] for node in model.graph)):
        value.type = ir.TensorType(dtype)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        rounded = value.const_value.numpy().astype(dtype.numpy())
        value.const_value = ir.tensor(rounded, name=value.name)
    return model


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_fuses_with_factors_that_are_rounded_to_half_precision(dtype: ir.DataType) -> None:
    model = half_model(0.044715, dtype)
    assert FuseTanhGeluPass()(model).modified
    assert operators(model) == {"Gelu": 1}


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_refuses_another_factor_in_half_precision_too(dtype: ir.DataType) -> None:
    model = half_model(0.05, dtype)
    assert not FuseTanhGeluPass()(model).modified
    assert "a factor is not 0.044715" in [r.reason for r in FuseTanhGeluPass().explain(model)]
