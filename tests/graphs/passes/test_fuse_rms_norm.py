from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.graph_cases import build, operators, run

from vlmport.graphs.passes.fuse_rms_norm import FuseRmsNormPass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

GRAPH = """
g (float[B, 3, 8] x, float[{scale}] scale) => (float[B, 3, 8] y)
<float two = {{2.0}}, float epsilon = {{0.00001}}, int64[1] axes = {{-1}}>
{{
    square = Pow(x, two)
    mean = ReduceMean<keepdims = 1>(square, axes)
    biased = Add(mean, epsilon)
    root = Sqrt(biased)
    inverse = Reciprocal(root)
    normal = Mul(x, inverse)
    y = Mul({order})
}}
"""


@pytest.mark.parametrize("order", ["scale, normal", "normal, scale"])
def test_fuses_once_and_keeps_the_output_when_the_pattern_is_whole(
    order: str, tmp_path: Path
) -> None:
    model = build(GRAPH.format(scale=8, order=order))
    inputs = {
        "x": np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32),
        "scale": np.linspace(0.5, 2, 8, dtype=np.float32),
    }
    before = run(model, inputs, tmp_path)
    assert FuseRmsNormPass()(model).modified
    assert operators(model) == {"RMSNormalization": 1}
    np.testing.assert_allclose(run(model, inputs, tmp_path)[0], before[0], atol=1e-6)
    assert not FuseRmsNormPass()(model).modified


def test_refuses_with_a_reason_when_the_scale_is_not_of_the_last_axis() -> None:
    model = build(GRAPH.format(scale="3, 8", order="scale, normal"))
    refusals = FuseRmsNormPass().explain(model)
    assert [r.reason for r in refusals] == ["scale is not of the length of the last axis alone"]
    assert not FuseRmsNormPass()(model).modified


def test_does_not_fire_when_an_inner_value_is_an_output() -> None:
    text = GRAPH.format(scale=8, order="scale, normal")
    model = build(text.replace("(float[B, 3, 8] y)", "(float[B, 3, 8] y, float[B, 3, 1] root)"))
    assert not FuseRmsNormPass()(model).modified


HALF = """
g ({half}[B, 3, 8] x, {scale}[8] scale) => ({scale}[B, 3, 8] y)
<float two = {{2.0}}, float epsilon = {{0.00001}}, int64[1] axes = {{-1}}>
{{
    wide = Cast<to = 1>(x)
    square = Pow(wide, two)
    mean = ReduceMean<keepdims = 1>(square, axes)
    biased = Add(mean, epsilon)
    root = Sqrt(biased)
    inverse = Reciprocal(root)
    normal = Mul(wide, inverse)
    back = Cast<to = {to}>(normal)
    y = Mul({order})
}}
"""


@pytest.mark.parametrize("order", ["scale, back", "back, scale"])
def test_takes_both_casts_into_the_node_when_x_is_half(order: str, tmp_path: Path) -> None:
    model = build(HALF.format(half="float16", scale="float16", to=10, order=order))
    inputs = {
        "x": np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float16),
        "scale": np.linspace(0.5, 2, 8).astype(np.float16),
    }
    inputs["x"][..., 3] = 600  # its square is beyond float16
    before = run(model, inputs, tmp_path)
    assert FuseRmsNormPass()(model).modified
    assert operators(model) == {"RMSNormalization": 1}
    assert model.graph[0].attributes["stash_type"].as_int() == 1
    after = run(model, inputs, tmp_path)[0]
    assert after.dtype == np.float16
    # ONNX Runtime rounds once where the casts round twice: one unit in the last place.
    np.testing.assert_allclose(after, before[0], rtol=2**-9)


def test_takes_the_casts_in_when_x_is_bfloat16() -> None:
    text = HALF.format(half="bfloat16", scale="bfloat16", to=16, order="scale, back")
    model = build(text)
    assert FuseRmsNormPass()(model).modified
    assert operators(model) == {"RMSNormalization": 1}


def test_refuses_when_the_cast_back_is_to_another_type_than_x() -> None:
    model = build(HALF.format(half="float16", scale="float", to=1, order="scale, back"))
    assert not FuseRmsNormPass()(model).modified
    reasons = [refusal.reason for refusal in FuseRmsNormPass().explain(model)]
    assert "scale is FLOAT, x is FLOAT16" in reasons


def test_keeps_the_casts_outside_when_the_scale_is_applied_in_float32(tmp_path: Path) -> None:
    text = HALF.format(half="float16", scale="float", to=1, order="scale, normal")
    text = text.replace("    back = Cast<to = 1>(normal)\n", "")
    text = text.replace("=> (float[B, 3, 8] y)", "=> (float16[B, 3, 8] z)")
    model = build(
        text.replace("y = Mul(scale, normal)", "y = Mul(scale, normal)\n z = Cast<to=10>(y)")
    )
    inputs: dict[str, NDArray[Any]] = {
        "x": np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float16),
        "scale": np.linspace(0.5, 2, 8).astype(np.float32),
    }
    before = run(model, inputs, tmp_path)
    assert FuseRmsNormPass()(model).modified
    assert operators(model) == {"Cast": 2, "RMSNormalization": 1}
    np.testing.assert_allclose(run(model, inputs, tmp_path)[0], before[0], rtol=2**-10)
