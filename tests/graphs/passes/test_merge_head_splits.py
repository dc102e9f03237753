from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.graph_cases import build, operators, run

from vlmport.graphs.passes.merge_head_splits import MergeHeadSplitsPass

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = """
g (float[B, S, 24] x) => (float[B, 4, S, 4] q, float[B, 2, S, {key}] k)
<int64[2] sizes = {{16, 8}}, int64[4] wide = {{0, 0, 4, 4}}, int64[4] narrow = {{0, 0, 2, {key}}}>
{{
    a, b = Split<axis = {axis}>(x, sizes)
    ar = Reshape(a, wide)
    br = Reshape(b, narrow)
    q = Transpose<perm = [0, 2, 1, 3]>(ar)
    k = Transpose<perm = [{perm}]>(br)
}}
"""
WHOLE = {"axis": -1, "perm": "0, 2, 1, 3", "key": 4}


def test_merges_and_keeps_the_outputs(tmp_path: Path) -> None:
    model = build(GRAPH.format(**WHOLE))
    x = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    before = run(model, {"x": x}, tmp_path)
    assert MergeHeadSplitsPass()(model).modified
    assert operators(model) == {"Reshape": 1, "Transpose": 1, "Split": 1}
    for old, new in zip(before, run(model, {"x": x}, tmp_path), strict=True):
        np.testing.assert_array_equal(new, old)
    assert not MergeHeadSplitsPass()(model).modified


@pytest.mark.parametrize("change", [{"axis": 2}, {"perm": "0, 2, 3, 1"}])
def test_refuses_other_forms(change: dict[str, object]) -> None:
    text = GRAPH.format(**(WHOLE | change))
    model = build(text)
    assert not MergeHeadSplitsPass()(model).modified


def test_refuses_when_a_part_has_another_reader() -> None:
    text = GRAPH.format(**WHOLE).replace("[B, 2, S, 4] k)", "[B, 2, S, 4] k, float[B, S, 8] b)")
    assert not MergeHeadSplitsPass()(build(text)).modified


def test_refuses_when_heads_differ_in_length() -> None:
    text = GRAPH.format(**WHOLE).replace("narrow = {0, 0, 2, 4}", "narrow = {0, 0, 1, 8}")
    model = build(text.replace("float[B, 2, S, 4] k", "float[B, 1, S, 8] k"))
    assert not MergeHeadSplitsPass()(model).modified
