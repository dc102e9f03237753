"""What TensorRT is given of a graph: its nodes with a cache of one size, and what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx.external_data_helper import uses_external_data

from vlmport.contract_engines import AttentionNode, EnginePort, EngineSource
from vlmport.errors import GraphError
from vlmport.graphs.tensorrt_form import tensorrt_form
from vlmport.graphs.token_selection import selection_graphs

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["attention_nodes", "engine_source", "selection_sources", "source_of"]

_CAPACITY = "capacity"  # the axis of a cache's rows
# Places among the inputs of Attention (opset 24).
_MASK, _LENGTHS = 3, 6


def engine_source(path: Path, graph: str, capacity: int) -> EngineSource:
    """Reads a graph of a bundle without its weights.

    TensorRT wants the rows of a cache static when it parses ("The KV cache tensor must have a
    static sequence length dimension"): fixing them in the parsed network comes too late.

    Args:
        path: <graph>.onnx.
        graph: its name in the bundle.
        capacity: rows of the cache.

    Raises:
        GraphError: if an Attention node has no name of its own.
    """
    changed = tensorrt_form(path)
    proto = (
        onnx.load(str(path), load_external_data=False)
        if changed is None
        else onnx.load_model_from_string(changed)
    )
    return source_of(proto, path, graph, capacity)


def source_of(proto: onnx.ModelProto, path: Path, graph: str, capacity: int = 0) -> EngineSource:
    """The same of a graph that is in memory, which is changed.

    Args:
        proto: the graph.
        path: where it would lie; its external weights are found from there.
        graph: its name.
        capacity: rows of the cache, if it has one.

    Raises:
        GraphError: if an Attention node has no name of its own.
    """
    for port in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dimension in port.type.tensor_type.shape.dim:
            if dimension.dim_param == _CAPACITY:
                dimension.dim_value = capacity
    files = {
        entry.value
        for tensor in proto.graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    weights = {tensor.name for tensor in proto.graph.initializer}
    return EngineSource(
        graph=graph,
        model=proto.SerializeToString(),
        path=path,
        inputs=tuple(_port(port) for port in proto.graph.input if port.name not in weights),
        outputs=tuple(_port(port) for port in proto.graph.output),
        attention=attention_nodes(proto, path.name),
        cache_updates=sum(node.op_type == "TensorScatter" for node in proto.graph.node),
        weight_files=tuple(sorted(files)),
    )


def _port(port: onnx.ValueInfoProto) -> EnginePort:
    tensor = port.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return EnginePort(port.name, dtype.name, shape)


def selection_sources(bundle: Path, vocab_size: int) -> list[EngineSource]:
    """The graphs that choose the next token, which lie in no file.

    Args:
        bundle: a folder that they would lie in; they have no external weights.
        vocab_size: logits of one row.
    """
    return [
        source_of(model, bundle / f"{graph}.onnx", graph)
        for graph, model in selection_graphs(vocab_size).items()
    ]


def attention_nodes(proto: onnx.ModelProto, name: str) -> tuple[AttentionNode, ...]:
    """What the Attention nodes of a graph mean.

    Args:
        proto: the graph.
        name: of it, for messages.

    Raises:
        GraphError: if one has no name of its own, by which its layer is found later.
    """
    nodes = [node for node in proto.graph.node if node.op_type == "Attention"]
    names = [node.name for node in nodes]
    if "" in names or len(set(names)) < len(names):
        msg = (
            f"{name}: {len(names)} Attention nodes have {len(set(names) - {''})} different names; "
            "expected a name of its own for each; export the checkpoint again"
        )
        raise GraphError(msg)
    return tuple(
        AttentionNode(
            name=node.name,
            causal=any(one.name == "is_causal" and one.i == 1 for one in node.attribute),
            lengths=_input(node, _LENGTHS),
            mask=_input(node, _MASK),
        )
        for node in nodes
    )


def _input(node: onnx.NodeProto, place: int) -> str:
    return node.input[place] if len(node.input) > place else ""
