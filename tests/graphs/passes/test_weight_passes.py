from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from support.graph_cases import build, operators, plan_weights, run

from vlmport.export.recipe import planned
from vlmport.graphs.passes.fold_constants import FoldConstantsPass
from vlmport.graphs.passes.fold_weight_transpose import FoldWeightTransposePass
from vlmport.graphs.passes.fuse_parallel_matmul import FuseParallelMatmulPass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RNG = np.random.default_rng(0)
WEIGHTS: dict[str, NDArray[np.float32]] = {
    "q": RNG.normal(size=(6, 4)).astype(np.float32),
    "k": RNG.normal(size=(2, 4)).astype(np.float32),
    "q_bias": RNG.normal(size=6).astype(np.float32),
    "k_bias": RNG.normal(size=2).astype(np.float32),
}
X = {"x": RNG.normal(size=(3, 5, 4)).astype(np.float32)}
PARALLEL = """
g (float[B, S, 4] x, float[6, 4] q, float[2, 4] k, float[6] q_bias, float[2] k_bias)
    => (float[B, S, 6] queries, float[B, S, 2] keys)
{
    qt = Transpose<perm = [1, 0]>(q)
    kt = Transpose<perm = [1, 0]>(k)
    %s
}
"""
BARE = "queries = MatMul(x, qt)\n    keys = MatMul(x, kt)"
BIASED = (
    "q0 = MatMul(x, qt)\n    queries = Add(q_bias, q0)\n    "
    "k0 = MatMul(x, kt)\n    keys = Add(k0, k_bias)"
)
MIXED = "queries = MatMul(x, qt)\n    k0 = MatMul(x, kt)\n    keys = Add(k0, k_bias)"


def check_joining(body: str, tmp_path: Path) -> dict[str, int]:
    model = build(PARALLEL % body)
    plan_weights(model, WEIGHTS)
    FoldConstantsPass()(model)
    before = run(model, X, tmp_path, WEIGHTS)
    assert FoldWeightTransposePass()(model).modified
    assert "Transpose" not in operators(model)
    np.testing.assert_allclose(run(model, X, tmp_path, WEIGHTS)[0], before[0], atol=1e-6)
    FuseParallelMatmulPass()(model)
    after = run(model, X, tmp_path, WEIGHTS)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-6)
    return dict(operators(model))


def test_joins_products_without_bias(tmp_path: Path) -> None:
    assert check_joining(BARE, tmp_path) == {"MatMul": 1, "Split": 1}


def test_joins_products_and_their_biases_in_either_order(tmp_path: Path) -> None:
    assert check_joining(BIASED, tmp_path) == {"MatMul": 1, "Add": 1, "Split": 1}


def test_refuses_when_only_some_products_have_a_bias(tmp_path: Path) -> None:
    assert check_joining(MIXED, tmp_path) == {"MatMul": 2, "Add": 1}


def test_transposition_stays_when_it_is_no_swap_of_a_planned_weight() -> None:
    model = build("g (float[2, 3] x) => (float[3, 2] y) { y = Transpose<perm = [1, 0]>(x) }")
    assert not FoldWeightTransposePass()(model).modified


def test_folding_constants_drops_weights_that_nothing_reads() -> None:
    model = build("g (float[2, 2] x, float[2, 2] dead) => (float[2, 2] y) { y = Neg(x) }")
    plan_weights(model, {"dead": np.zeros((2, 2), np.float32)})
    FoldConstantsPass()(model)
    assert not [v for v in model.graph.initializers.values() if planned(v)]
