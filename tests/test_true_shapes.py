"""Graphs with the layers of released models build in TensorRT-RTX, their attention fused."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import onnx
import pytest
from onnx import TensorProto, helper
from support.tensorrt_build import BuildError, build_graph
from support.true_shapes import CONNECTORS, DECODERS, TOWERS, write_graph

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {**DECODERS, **TOWERS, **CONNECTORS}
CAPACITY = 512
MEBIBYTE = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_true_shape_builds_with_fused_attention(name: str, tmp_path: Path) -> None:
    """In half precision a layer that nobody marked as decomposable is fused, or it does not build.

    That is checked below on a head for which there is no kernel. The soft cap of Gemma 2 has none.
    """
    shape = SHAPES[name]
    started = time.monotonic()
    path = write_graph(tmp_path, shape, "float16")
    exported = time.monotonic()
    weights = sum(file.stat().st_size for file in tmp_path.iterdir())
    result = build_graph(path, CAPACITY)
    built = time.monotonic()
    head_dims = set(attention_heads(path).values())
    fused = result.layers.get("ATTENTION_INPUT", 0)
    print(  # what the issue asks the run to show
        f"\n{name}: graph {weights / MEBIBYTE:.0f} MiB in {exported - started:.1f} s, engine "
        f"{result.engine_bytes / MEBIBYTE:.0f} MiB in {built - exported:.1f} s, {fused} fused "
        f"attention layers of head_dim {shape.head_dim}"
    )
    assert head_dims == {shape.head_dim}
    assert result.engine_bytes > 0.9 * weights
    capped = "attn_logit_softcapping" in shape.config
    assert fused == (0 if capped else len(attention_heads(path)))
    assert result.layers.get("SOFTMAX", 0) == (2 if capped else 0)
    assert result.warnings == ()


def attention_heads(path: Path) -> dict[str, int]:
    """Attention node -> length of a head."""
    model = onnx.load(str(path), load_external_data=False)
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
    return {
        node.name: known[node.input[0]].type.tensor_type.shape.dim[3].dim_value
        for node in model.graph.node
        if node.op_type == "Attention"
    }


def attention(folder: Path, head_dim: int) -> Path:
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 2, 8, head_dim])
        for name in "qkv"
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 2, 8, head_dim])
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attend")
    model = helper.make_model(
        helper.make_graph([node], "attend", ports, [output]),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    path = folder / "attend.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
def test_attention_has_a_kernel_for_the_heads_of_released_models(
    head_dim: int, tmp_path: Path
) -> None:
    assert build_graph(attention(tmp_path, head_dim)).layers["ATTENTION_INPUT"] == 1


def test_attention_without_a_kernel_does_not_build_by_itself(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="not supported by a dedicated kernel"):
        build_graph(attention(tmp_path, 512))
