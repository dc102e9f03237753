from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from support.measured_memory import measured_peak

from vlmport.errors import GraphError
from vlmport.graphs.live_memory import LivePeak, live_peak
from vlmport.manifest import load_manifest

LENGTHS = {"rows": 10}
ROW = 4 * 8  # bytes of a row of the ports
X = 10 * ROW


def peak(
    *nodes: NodeProto, outputs: tuple[str, ...] = ("y",), outside: tuple[str, ...] = ()
) -> LivePeak:
    weight = numpy_helper.from_array(np.ones((8, 8), np.int8), "weight")
    scale = numpy_helper.from_array(np.array(0.5, np.float32), "scale")
    wide = numpy_helper.from_array(np.ones((8, 80), np.float32), "wide")
    split = numpy_helper.from_array(np.array([10, -1], np.int64), "shape")
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 8])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [weight, scale, wide, split],
        ),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    return live_peak(ir.from_proto(model), "graph", LENGTHS, outside, lambda _: False)


def node(operator: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    name = f"make_{output}"
    return helper.make_node(operator, inputs.split(), output.split(), name=name, **attributes)


def test_a_chain_holds_two_values_at_a_time_and_its_ports() -> None:
    chain = [node("Relu", "x", "a"), node("Relu", "a", "b"), node("Relu", "b", "c")]
    found = peak(*chain, node("Relu", "c", "y"))
    assert found == LivePeak(4 * X, 2 * X, "make_b", "Relu", 0)


def test_a_value_lives_to_its_last_reader() -> None:
    early = [node("Relu", "x", "a"), node("Relu", "a", "b"), node("Relu", "b", "c")]
    assert peak(*early, node("Add", "c b", "d"), node("Add", "d a", "y")).total_bytes == 6 * X
    assert peak(*early, node("Add", "c b", "d"), node("Add", "d d", "y")).total_bytes == 5 * X


def test_a_wide_value_is_found() -> None:
    found = peak(
        node("Relu", "x", "a"),
        node("MatMul", "a wide", "b"),
        node("Relu", "b", "c"),
        node("ReduceMax", "c", "y", keepdims=1),
    )
    assert (found.operator, found.total_bytes) == ("Relu", 21 * X + 4)


def test_a_reshape_takes_no_memory_and_keeps_its_input_alive() -> None:
    found = peak(
        node("Relu", "x", "a"),
        node("Reshape", "a shape", "b"),
        node("Relu", "x", "c"),
        node("Add", "b c", "y"),
    )
    assert found.total_bytes == 2 * X + 2 * X


def test_what_follows_from_weights_alone_takes_none() -> None:
    found = peak(
        node("DequantizeLinear", "weight scale", "a"),
        node("Transpose", "a", "b"),
        node("MatMul", "x b", "y"),
    )
    assert found.total_bytes == found.port_bytes == 2 * X


def test_a_value_without_a_reader_does_not_stay() -> None:
    found = peak(node("Relu", "x", "unread"), node("Relu", "x", "a"), node("Relu", "a", "y"))
    assert found.total_bytes == 3 * X


def test_ports_of_others_take_none() -> None:
    assert peak(node("Relu", "x", "y"), outside=("x",)).total_bytes == X
    assert peak(node("Relu", "x", "y"), outside=("x", "y")).total_bytes == 0


def test_sizes_that_are_computed_in_the_graph() -> None:
    found = peak(
        node("Shape", "x", "sizes"),
        node("ReduceMax", "x", "most", keepdims=1),
        node("Expand", "most sizes", "a"),
        node("Add", "a x", "y"),
    )
    assert (found.operator, found.total_bytes) == ("Expand", 3 * X + 4)


def test_a_size_that_depends_on_content_is_refused() -> None:
    with pytest.raises(GraphError, match="graph: the shape of"):
        peak(node("NonZero", "x", "a"), node("Cast", "a", "y", to=TensorProto.FLOAT))


def test_an_axis_without_a_length_is_refused() -> None:
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "columns"])
    graph = helper.make_graph([node("Relu", "x", "y")], "graph", [port], [])
    model = ir.from_proto(helper.make_model(graph, ir_version=11))
    with pytest.raises(GraphError, match="no length for columns of x"):
        live_peak(model, "graph", LENGTHS, (), lambda _: False)


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [((2, 4, 6, 16), {}), ((2, 6, 64), {"q_num_heads": 4, "kv_num_heads": 4})],
)
def test_scores_are_stored_where_attention_is_taken_apart(
    shape: tuple[int, ...], attributes: dict[str, int]
) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkv"]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [node("Attention", "q k v", "y", **attributes)], "graph", ports, [output]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    ports_bytes = 4 * 4 * 2 * 6 * 64
    scores = 2 * 4 * (2 * 4 * 6 * 6)
    stored = live_peak(ir.from_proto(proto), "graph", {}, (), lambda _: True)
    assert (stored.score_bytes, stored.total_bytes) == (scores, ports_bytes + scores)
    fused = live_peak(ir.from_proto(proto), "graph", {}, (), lambda _: False)
    assert (fused.score_bytes, fused.total_bytes) == (0, ports_bytes)


# Real peaks hold what kernels take beside the values (a copy of the pictures in a convolution), and
# lack what ONNX Runtime computes in place.
@pytest.mark.parametrize(
    ("graph", "lengths"),
    [
        ("vision_encoder", {"num_images": 256}),
        ("projector", {"num_images": 512}),
        ("decoder", {"batch": 4, "sequence_length": 512, "capacity": 1024}),
    ],
)
def test_the_estimate_is_near_what_onnxruntime_takes(
    trained_bundle: Path, graph: str, lengths: dict[str, int]
) -> None:
    spec = load_manifest(trained_bundle).graph(graph)
    path = trained_bundle / spec.file
    caches = {port.name for port in (*spec.inputs, *spec.outputs) if "key_values" in port.name}
    estimate = live_peak(ir.load(path), graph, lengths, caches, lambda _: True)
    ratio = estimate.total_bytes / measured_peak(path, lengths)
    print(f"{graph}: estimate / measured {ratio:.2f}")
    assert 0.9 < ratio < 1.3
