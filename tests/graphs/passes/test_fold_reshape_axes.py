from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from support.graph_cases import build, operators, run

from vlmport.graphs.passes.fold_reshape_axes import FoldReshapeAxesPass

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = """
g (float[B, S, 8] x, int64[4] lengths) => (float[B, S, 2, 4] y) { y = Reshape(x, lengths) }
"""


def test_target_becomes_constant_when_only_unchanged_axes_are_dynamic(tmp_path: Path) -> None:
    model = build(GRAPH)
    assert FoldReshapeAxesPass()(model).modified
    model.graph.inputs.pop()
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    np.testing.assert_array_equal(run(model, {"x": x}, tmp_path)[0], x.reshape(2, 3, 2, 4))
    assert operators(model) == {"Reshape": 1}


def test_one_axis_may_be_the_rest(tmp_path: Path) -> None:
    model = build("g (float[B, S, 8] x, int64[2] n) => (float[T, 8] y) { y = Reshape(x, n) }")
    assert FoldReshapeAxesPass()(model).modified
    model.graph.inputs.pop()
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    np.testing.assert_array_equal(run(model, {"x": x}, tmp_path)[0], x.reshape(6, 8))


def test_refuses_when_two_axes_are_unknown() -> None:
    model = build("g (float[B, S] x, int64[2] n) => (float[T, U] y) { y = Reshape(x, n) }")
    assert not FoldReshapeAxesPass()(model).modified


def test_refuses_when_the_shape_is_unknown() -> None:
    model = build(GRAPH)
    model.graph.outputs[0].shape = None
    assert not FoldReshapeAxesPass()(model).modified
    assert isinstance(model, ir.Model)
