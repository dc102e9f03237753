"""Lets a float32 graph compute in half precision where that loses nothing, and says where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import onnx_ir as ir

from vlmport.calibration.half_ranges import RangeReason, find_ranges, find_weights, half_probes
from vlmport.calibration.node_modules import node_module
from vlmport.contract import IMAGE_GRAPHS
from vlmport.errors import CalibrationError
from vlmport.graphs.float32_regions import RegionReason, float32_regions
from vlmport.graphs.passes.convert_precision import ConvertPrecisionPass
from vlmport.graphs.value_types import (
    infer_types,
    is_float32,
    moved_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from vlmport.calibration.half_ranges import Finding
    from vlmport.calibration.statistics import GraphStatistics
    from vlmport.contract import GraphSpec
    from vlmport.graphs.half_tensors import HalfType

__all__ = ["HalfReport", "KeptNode", "float32_ports", "half_precision_", "half_probes"]

HalfKind = Literal["fp16", "bf16"]
KeptReason: TypeAlias = RegionReason | RangeReason | Literal["cache", "logits"]
_DTYPES: dict[HalfKind, HalfType] = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}


@dataclass(frozen=True, slots=True)
class KeptNode:
    """A node that stays float32.

    Attributes:
        operator: type of the node.
        node: its name in the graph.
        module: the PyTorch module that it came from, or several joined by ", ".
        reason: why it stays; "cache" for attention over a float32 cache, "logits" for their maker.
        value: name of the value or weight that half precision cannot hold; "" if the reason is
            the computation itself.
        largest: its largest magnitude that was seen (of scores, a bound), or 0.
        smallest: its smallest magnitude that is not 0, or 0.
    """

    operator: str
    node: str
    module: str
    reason: KeptReason
    value: str = ""
    largest: float = 0.0
    smallest: float = 0.0


@dataclass(frozen=True, slots=True)
class HalfReport:
    """What became of a graph.

    Attributes:
        kind: "fp16" or "bf16".
        converted: nodes that compute in half precision now.
        kept: nodes that stay float32, in the order of the graph.
        unseen: values without statistics, whose range was not judged; all of them if no
            statistics were given.
    """

    kind: HalfKind
    converted: int
    kept: tuple[KeptNode, ...]
    unseen: tuple[str, ...]


def half_precision_(
    model: ir.Model,
    kind: HalfKind,
    statistics: GraphStatistics | None,
    float32_ports: Collection[str] = (),
) -> HalfReport:
    """Converts a float32 graph in place.

    Args:
        model: the graph.
        kind: "fp16" or "bf16".
        statistics: of the values of `half_probes`, or None for no analysis of ranges.
        float32_ports: inputs and outputs that stay float32 (`float32_ports`); all of them for a
            graph whose neighbours stay float32.

    Raises:
        CalibrationError: if what leaves the graph in half precision, or what is written to a
            cache, is beyond its range.
        GraphError: if the graph is not of the form that an export writes.
    """
    infer_types(model)
    dtype = _DTYPES[kind]
    reasons: dict[ir.Node, KeptReason] = {**float32_regions(model)}
    if kind == "bf16":
        reasons.update(dict.fromkeys(_makers_of_logits(model), "logits"))
    weights = find_weights(model, dtype)
    found = (*weights, *find_ranges(model, dtype, statistics or {}))
    _check_ports(model, {finding.node: finding for finding in found}, float32_ports, kind)
    findings = {finding.node: finding for finding in found if finding.node not in reasons}
    unseen = tuple(p.value for p in half_probes(model) if p.value not in (statistics or {}))
    nodes = list(model.graph)
    ConvertPrecisionPass(
        dtype,
        {*findings, *reasons},
        float32_ports,
        {finding.value for finding in weights},
    )(model)
    stay = [n for n in nodes if n in findings or n in reasons or _is_float32_attention(n)]
    kept = tuple(_kept(node, findings, reasons) for node in stay)
    converted = sum(node.outputs[0].dtype == ir.DataType[dtype] for node in nodes)
    return HalfReport(kind, converted, kept, unseen)


def float32_ports(graphs: Sequence[GraphSpec]) -> frozenset[str]:
    """Ports that are float32 in a bundle whose graphs all compute in half precision.

    What the runtime makes of a picture enters as float32 and logits leave as such; what graphs
    hand to each other and the cache are in half precision, as `vlmport export` writes them.
    """
    handed_on = {port.name for graph in graphs for port in graph.outputs}
    pictures = {
        port.name
        for graph in graphs
        if graph.name in IMAGE_GRAPHS
        for port in graph.inputs
        if port.name not in handed_on
    }
    return frozenset(pictures | {"logits"})


def _makers_of_logits(model: ir.Model) -> list[ir.Node]:
    """The node that makes the logits: 8 bits would make ties of the best tokens."""
    makers = [value.producer() for value in model.graph.outputs if value.name == "logits"]
    return [node for node in makers if node is not None]


def _kept(
    node: ir.Node, findings: dict[ir.Node, Finding], reasons: dict[ir.Node, KeptReason]
) -> KeptNode:
    place = (node.op_type, str(node.name), node_module(node))
    if node in findings:
        found = findings[node]
        return KeptNode(*place, found.reason, found.value, found.largest, found.smallest)
    return KeptNode(*place, reasons.get(node, "cache"))


def _is_float32_attention(node: ir.Node) -> bool:
    return node.op_type == "Attention" and is_float32(node.outputs[0])


def _check_ports(
    model: ir.Model,
    findings: dict[ir.Node, Finding],
    float32_ports: Collection[str],
    kind: HalfKind,
) -> None:
    """Refuses what cannot leave the graph in the type of its port, a cache among them."""
    for value in model.graph.outputs:
        maker = value.producer()
        found = findings.get(maker) if maker is not None else None
        if not is_float32(value) or value.name in float32_ports or maker is None or found is None:
            continue
        if found.reason != "overflow" or found.value not in _sources(maker, value):
            continue
        msg = (
            f"{value.name}: {found.value} of {node_module(maker)} reaches {found.largest:.4g}, and "
            f"{kind} cannot hold it with headroom; expected values of the graph's outputs within "
            "32752; use bf16, or keep this graph's ports in float32"
        )
        raise CalibrationError(msg)


def _sources(maker: ir.Node, value: ir.Value) -> set[str]:
    """Names of the value and of all that moving nodes have made it of."""
    names, waiting = {str(value.name)}, [maker]
    while waiting:
        for moved in moved_inputs(waiting.pop()):
            names.add(str(moved.name))
            if (before := moved.producer()) is not None:
                waiting.append(before)
    return names
