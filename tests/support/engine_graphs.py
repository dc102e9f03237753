"""Small graphs with attention over a cache, and networks that TensorRT-RTX parses of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from vlmport.contract_engines import EngineProfile, EngineSource, PortRange
from vlmport.graphs.engine_source import source_of
from vlmport.runtime.engines.bindings import Bindings, load_bindings
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.network import parse_network

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["CAPACITY", "ParsedGraph", "cached_attention", "one_profile", "parsed", "source"]

HEADS, KV_HEADS, CAPACITY, HEAD_DIM = 4, 2, 32, 16


def cached_attention(
    *,
    causal: bool = True,
    lengths: str = "lengths",
    mask: str = "",
    dtype: int = TensorProto.FLOAT16,
    attributes: dict[str, Any] | None = None,
    names: Sequence[str] = ("attend",),
) -> onnx.ModelProto:
    """Queries over a cache whose valid rows are computed: lengths = written + added.

    Args:
        causal: is_causal of the nodes.
        lengths: the tensor that bounds the keys; "" for none.
        mask: the port with a mask; "" for none.
        dtype: of queries, keys and values.
        attributes: more of the nodes.
        names: of the Attention nodes; each works on what the one before it gives.
    """
    rows: list[str | int | None] = ["batch", KV_HEADS, CAPACITY, HEAD_DIM]
    queries: list[str | int | None] = ["batch", HEADS, "sequence_length", HEAD_DIM]
    make = helper.make_tensor_value_info
    ports = [
        make("queries", dtype, queries),
        make("keys", dtype, rows),
        make("values", dtype, rows),
        make("written", TensorProto.INT64, ["batch"]),
        make("added", TensorProto.INT64, ["batch"]),
    ]
    if mask:
        shape: list[str | int | None] = ["batch", 1, "sequence_length", CAPACITY]
        ports.append(make(mask, TensorProto.BOOL, shape))
    nodes = [
        helper.make_node("Add", ["written", "added"], ["lengths"]),
        helper.make_node("Sub", ["written", "added"], ["difference"]),
        # Read by what the graph gives out, so that no port is unused.
        helper.make_node("Add", ["lengths", "difference"], ["counts"]),
    ]
    before = "queries"
    for name in names:
        inputs = [before, "keys", "values", mask, "", "", lengths]
        before = f"{name}_output"
        nodes.append(
            helper.make_node(
                "Attention",
                inputs,
                [before],
                name=name,
                is_causal=int(causal),
                **(attributes or {}),
            )
        )
    outputs = [make(before, dtype, queries), make("counts", TensorProto.INT64, ["batch"])]
    return helper.make_model(
        helper.make_graph(nodes, "attend", ports, outputs),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )


def source(model: onnx.ModelProto) -> EngineSource:
    return source_of(model, Path("attend.onnx"), "decoder")


@dataclass(frozen=True, slots=True)
class ParsedGraph:
    """A network as the parser leaves it.

    Attributes:
        bindings: of TensorRT-RTX.
        network: the network.
        source: the graph that it came from.
        keep: what must outlive the network.
    """

    bindings: Bindings
    network: trt.INetworkDefinition
    source: EngineSource
    keep: tuple[Any, ...]


@contextlib.contextmanager
def parsed(model: onnx.ModelProto) -> Iterator[ParsedGraph]:
    bindings = load_bindings("tensorrt-rtx")
    with listening() as log:
        logger = engine_logger(bindings)
        builder = bindings.Builder(logger)
        found = source(model)
        network, parser = parse_network(bindings, builder, found, log, logger)
        yield ParsedGraph(bindings, network, found, (builder, parser))


def one_profile(found: EngineSource, **axes: tuple[int, int, int]) -> tuple[EngineProfile, ...]:
    """A profile by the ranges of axes; batch and sequence_length have some by default."""
    known = {"batch": (1, 2, 4), "sequence_length": (1, 4, 16)} | axes
    ranges = []
    for port in found.inputs:
        bounds = [known[axis] if isinstance(axis, str) else (axis,) * 3 for axis in port.shape]
        least, usual, most = (tuple(one[which] for one in bounds) for which in range(3))
        ranges.append(PortRange(port.name, least, usual, most))
    return (EngineProfile("default", tuple(ranges), None),)
