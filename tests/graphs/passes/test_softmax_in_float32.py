from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graph_cases import build

from vlmport.graphs.passes.softmax_in_float32 import SoftmaxInFloat32Pass

GRAPH = """
g ({type}[1, 2, S, 8] q, {type}[1, 2, S, 8] k, {type}[1, 2, S, 8] v) => ({type}[1, 2, S, 8] y)
{{ y = Attention<scale = 0.5{more}>(q, k, v) }}
"""


def precision(model: ir.Model) -> int | None:
    attributes = model.graph[0].attributes
    return attributes["softmax_precision"].as_int() if "softmax_precision" in attributes else None


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_names_float32_once_when_the_queries_are_half(kind: str) -> None:
    model = build(GRAPH.format(type=kind, more=""))
    assert SoftmaxInFloat32Pass()(model).modified
    assert precision(model) == int(ir.DataType.FLOAT)
    assert not SoftmaxInFloat32Pass()(model).modified


def test_leaves_float32_attention_alone() -> None:
    model = build(GRAPH.format(type="float", more=""))
    assert not SoftmaxInFloat32Pass()(model).modified
    assert precision(model) is None


def test_keeps_a_precision_that_is_named_already() -> None:
    model = build(GRAPH.format(type="float16", more=", softmax_precision = 10"))
    assert not SoftmaxInFloat32Pass()(model).modified
    assert precision(model) == int(ir.DataType.FLOAT16)
