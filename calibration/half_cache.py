"""Stores the cache of a float32 graph in float16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.calibration.half_ranges import find_ranges
from vlmport.calibration.node_modules import node_module
from vlmport.errors import CalibrationError, GraphError
from vlmport.graphs.passes.convert_precision import ConvertPrecisionPass
from vlmport.graphs.value_types import infer_types, is_float32

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmport.calibration.statistics import GraphStatistics

__all__ = ["half_cache_"]


def half_cache_(model: ir.Model, statistics: GraphStatistics | None = None) -> int:
    """Makes past and present keys and values float16, in place as before; all else stays float32.

        past, k -> TensorScatter -> present;  q, present -> Attention -> y         all float32
     => past, Cast(k) -> TensorScatter -> present;  Cast(q), present -> Attention -> Cast -> y

    Attention reads the cache as it is stored. Casting the cache up instead would read and write all
    of its capacity in every step and layer, and would leave TensorRT without a fused kernel, of
    which it has none for float32; it would halve the rounding error of attention
    (docs/quantization/kv-cache.md has the figures).

    Args:
        model: a float32 decoder.
        statistics: of the values of `half_probes`, or None for no analysis of ranges.

    Returns:
        How many caches there are, keys and values counted apart.

    Raises:
        GraphError: if the graph has no float32 cache that is updated in place.
        CalibrationError: if keys, values or scores of attention are beyond float16.
    """
    infer_types(model)
    scatters = [node for node in model.graph if _updates_a_port(node, model)]
    if not scatters:
        msg = (
            f"graph {model.graph.name!r}: no TensorScatter updates a float32 input; expected a "
            "decoder of a float32 bundle, whose cache is not in half precision yet"
        )
        raise GraphError(msg)
    caches = {node.outputs[0] for node in scatters}
    attentions = [n for n in model.graph if n.op_type == "Attention" and n.inputs[1] in caches]
    half_nodes = {*scatters, *attentions}
    _check_ranges(model, half_nodes, statistics)
    cache_ports = {str(v.name) for node in scatters for v in (node.inputs[0], node.outputs[0]) if v}
    ports = {str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)}
    ConvertPrecisionPass(
        "FLOAT16",
        {node for node in model.graph if node not in half_nodes},
        ports - cache_ports,
        set(model.graph.initializers),
    )(model)
    return len(scatters)


def _updates_a_port(node: ir.Node, model: ir.Model) -> bool:
    past = node.inputs[0] if node.op_type == "TensorScatter" else None
    return past is not None and past in model.graph.inputs and is_float32(past)


def _check_ranges(
    model: ir.Model, half_nodes: set[ir.Node], statistics: GraphStatistics | None
) -> None:
    for found in find_ranges(model, "FLOAT16", statistics or {}):
        if found.node in half_nodes and found.reason in {"overflow", "scores overflow"}:
            msg = (
                f"{node_module(found.node)}: {found.reason}, {found.value} reaches "
                f"{found.largest:.4g}; expected keys, values and scores of attention within "
                "32752; leave the cache in float32"
            )
            raise CalibrationError(msg)
