from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
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
