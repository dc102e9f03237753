from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from support.graph_cases import build

from vlmport.api.layer_groups import LayerGroup, layer_groups
from vlmport.calibration.layers import Layer, find_layers


def layer(name: str) -> Layer:
    model = build("g (float[1, 2] x) => (float[1, 2] y) { y = Identity(x) }")
    value, node = model.graph.inputs[0], model.graph.node(0)
    return Layer(name, (name,), "MatMul", node, value, value, 0, 1)


def names(blocks: int) -> list[str]:
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.3.up_proj", "mlp.down_proj")
    inner = [f"model.layers.{block}.{part}" for block in range(blocks) for part in parts]
    return [*inner, "lm_head"]


def test_many_layers_are_grouped_by_part_of_a_block() -> None:
    groups = layer_groups("decoder", [layer(name) for name in names(10)])
    assert len(groups) == 21
    assert groups[3] == LayerGroup(
        "decoder",
        "model.layers.1.mlp",
        ("model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.down_proj"),
        ("model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.down_proj"),
    )
    assert groups[-1].name == "lm_head"


def test_single_layers_stay_alone_in_small_graphs_or_when_asked() -> None:
    few = [layer(name) for name in names(2)]
    many = [layer(name) for name in names(10)]
    assert len(layer_groups("decoder", few)) == 9
    assert len(layer_groups("decoder", many, single=True)) == 41


def test_a_numbered_layer_without_parts_is_its_own_group() -> None:
    flat = [layer(f"connector.{index}") for index in range(30)]
    assert [group.name for group in layer_groups("projector", flat)] == [one.name for one in flat]


@pytest.mark.usefixtures("trained_bundle")
def test_every_layer_of_a_real_graph_is_in_one_group(trained_bundle: Path) -> None:
    layers = find_layers(ir.load(trained_bundle / "decoder.onnx"))
    for single in (False, True):
        grouped = [
            name for g in layer_groups("decoder", layers, single=single) for name in g.layers
        ]
        assert sorted(grouped) == sorted(one.name for one in layers)
