"""What a comparison with other quantizers must not change or miscount."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from peers.peer_graph import write_plain_graph
from peers.peer_table import sign_test


def write_gemm(path: Path, *, bias: bool, trans_b: int = 1) -> None:
    rng = np.random.default_rng(5)
    weights = {"weight": rng.normal(size=(5, 3)), "bias": rng.normal(size=5)}
    inputs = ["x", "weight", *(["bias"] if bias else [])]
    graph = helper.make_graph(
        [helper.make_node("Gemm", inputs, ["y"], transB=trans_b)],
        "head",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 5])],
        [
            numpy_helper.from_array(weights[name].astype(np.float32), name)
            for name in inputs
            if name != "x"
        ],
        # As exported graphs have it: the weight's own shape, which transposing makes wrong.
        value_info=[helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, [5, 3])],
    )
    opset = helper.make_opsetid("", 24)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def run(path: Path, x: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bias", [False, True])
def test_a_gemm_as_matmul_computes_the_same(tmp_path: Path, bias: bool) -> None:
    write_gemm(tmp_path / "gemm.onnx", bias=bias)
    write_plain_graph(tmp_path / "gemm.onnx", tmp_path / "matmul.onnx", gemm_as_matmul=True)
    written = onnx.load(tmp_path / "matmul.onnx")
    onnx.checker.check_model(written, full_check=True)
    operators = [node.op_type for node in written.graph.node]
    assert operators == (["MatMul", "Add"] if bias else ["MatMul"])
    assert all(node.name for node in written.graph.node)
    x = np.random.default_rng(6).normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        run(tmp_path / "matmul.onnx", x), run(tmp_path / "gemm.onnx", x), rtol=1e-5, atol=1e-6
    )


def test_another_gemm_is_refused(tmp_path: Path) -> None:
    write_gemm(tmp_path / "gemm.onnx", bias=False, trans_b=0)
    with pytest.raises(ValueError, match="expected x times a transposed weight"):
        write_plain_graph(tmp_path / "gemm.onnx", tmp_path / "out.onnx", gemm_as_matmul=True)


def test_the_sign_test_is_the_two_sided_binomial_one() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(3, 3) == 1
    assert sign_test(0, 3) == sign_test(3, 0) == pytest.approx(0.25)
    assert sign_test(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
