from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.graph_cases import build, operators, run

from vlmport.graphs.passes.split_fused_heads import SplitFusedHeadsPass

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = """
g (float[B, S, 24] x, float[3] w, float[3] b)
=> (float[B, 4, S, 3] q, float[B, S, 4, 3] k)
<int64[5] lengths = {0, 0, 4, 2, 3}, int64 zero = {0}, int64 one = {1}>
{
    heads = Reshape(x, lengths)
    first = Gather<axis = 3>(heads, zero)
    second = Gather<axis = 3>(heads, one)
    normed = LayerNormalization<axis = -1>(first, w, b)
    q = Transpose<perm = [0, 2, 1, 3]>(normed)
    turned = Transpose<perm = [0, 2, 1, 3]>(second)
    k = Transpose<perm = [0, 2, 1, 3]>(turned)
}
"""


def test_splits_once_and_keeps_the_outputs(tmp_path: Path) -> None:
    model = build(GRAPH)
    generator = np.random.default_rng(0)
    shapes = {"x": (2, 5, 24), "w": (3,), "b": (3,)}
    inputs = {n: generator.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    before = run(model, inputs, tmp_path)
    assert SplitFusedHeadsPass()(model).modified
    expected = {"Reshape": 1, "Transpose": 2, "Split": 1, "LayerNormalization": 1}
    assert operators(model) == expected
    for old, new in zip(before, run(model, inputs, tmp_path), strict=True):
        np.testing.assert_array_equal(new, old)
    assert not SplitFusedHeadsPass()(model).modified


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Case 1: another form of the reshape.
        ("{0, 0, 4, 2, 3}", "{0, 5, 4, 2, 3}"),
        # Case 2: a part twice, and a reader that is no part.
        ("(heads, one)", "(heads, zero)"),
        (
            "first = Gather<axis = 3>(heads",
            "copy = Identity(heads)\n    first = Gather<axis=3>(copy",
        ),
        # Case 3: another order, another axis of the normalization, another reader.
        ("q = Transpose<perm = [0, 2, 1, 3]>", "q = Transpose<perm = [0, 2, 3, 1]>"),
        ("LayerNormalization<axis = -1>", "LayerNormalization<axis = 2>"),
        ("=> (", "=> (float[B, S, 4, 3] first, "),
        ("=> (", "=> (float[B, S, 4, 3] normed, "),
        ("=> (", "=> (float[B, S, 4, 2, 3] heads, "),
    ],
)
def test_refuses_other_forms(old: str, new: str) -> None:
    text = GRAPH.replace(old, new)
    assert text != GRAPH
    model = build(text.replace("float[B, 4, S, 3] q", "float[P, Q, R, T] q"))
    assert not SplitFusedHeadsPass()(model).modified
