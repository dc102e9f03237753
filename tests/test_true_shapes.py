"""Graphs with the layers of released models build in TensorRT-RTX, their attention fused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest
from support.single_engines import build_single
from support.true_shapes import CONNECTORS, DECODERS, TOWERS, write_graph

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {**DECODERS, **TOWERS, **CONNECTORS}
CAPACITY = 512
MEBIBYTE = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_true_shape_builds_with_fused_attention(name: str, tmp_path: Path) -> None:
    """The soft cap of Gemma 2 alone has no kernel: its attention is taken apart before."""
    shape = SHAPES[name]
    path = write_graph(tmp_path, shape, "float16")
    weights = sum(file.stat().st_size for file in tmp_path.iterdir())
    nodes = attention_nodes(path)
    result = build_single(path, CAPACITY)
    engine = result.engine
    print(  # what the issue asks the run to show
        f"\n{name}: graph {weights / MEBIBYTE:.0f} MiB, engine {engine.size / MEBIBYTE:.0f} MiB "
        f"in {engine.build_seconds:.1f} s, {sum(one.fused for one in engine.attention)} of {nodes} "
        f"attention layers fused, head_dim {shape.head_dim}, "
        f"mask {sorted({one.masking for one in engine.attention})}"
    )
    capped = "attn_logit_softcapping" in shape.config
    assert len(engine.attention) == (0 if capped else nodes)
    assert result.layers["SOFTMAX"] == (nodes if capped else 0)
    for layer in engine.attention:
        assert (layer.fused, layer.head_dim) == (True, shape.head_dim)
    assert engine.size > 0.9 * weights
    assert engine.warnings == ()


def attention_nodes(path: Path) -> int:
    model = onnx.load(str(path), load_external_data=False)
    return sum(node.op_type == "Attention" for node in model.graph.node)
