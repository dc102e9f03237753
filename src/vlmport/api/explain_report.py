"""What the layers of an engine are made of: as values, as JSON, and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vlmport.contract_engines import AttentionLayer

__all__ = ["ExplainedLayer", "GraphExplanation", "explanation_json", "print_explanations"]

_HIDDEN = "CONSTANT"


@dataclass(frozen=True, slots=True)
class ExplainedLayer:
    """A layer of a network or of an engine.

    Attributes:
        layer: its name.
        kind: TensorRT's name of its type; "" if that is not known.
        nodes: ONNX nodes that it computes, or a part of them.
        operators: of those nodes, in their order.
        modules: PyTorch modules that the nodes came from, each once.
        is_stretch: whether the nodes are only the first and the last of those in the layer.
        is_helper: whether it is one that the parser added; the nodes are then those that read it.
        outputs: element types of its outputs; "" for one that is not known.
        reads: element types of dequantized inputs: "int8" twice for a product in INT8.
        tactic: name of the kernel; "" if that is not known.
        missing: what the inspector does not say of the layer.
    """

    layer: str
    kind: str
    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    modules: tuple[str, ...]
    is_stretch: bool = False
    is_helper: bool = False
    outputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    tactic: str = ""
    missing: tuple[str, ...] = ()

    @property
    def is_fused(self) -> bool:
        """Whether it computes several nodes."""
        return len(self.nodes) > 1 and not self.is_helper


@dataclass(frozen=True, slots=True)
class GraphExplanation:
    """The layers of one graph.

    Attributes:
        graph: its name.
        source: "network": what the graph was parsed into, before anything is fused. "engine": what
            the engine inspector says.
        remarks: what is not known, and why.
        layers: in TensorRT's order.
        attention: what the build found of each attention layer.
        without_layer: nodes that no layer names: folded into others, or constants.
    """

    graph: str
    source: Literal["network", "engine"]
    remarks: tuple[str, ...]
    layers: tuple[ExplainedLayer, ...]
    attention: tuple[AttentionLayer, ...]
    without_layer: tuple[str, ...]


def explanation_json(graphs: Sequence[GraphExplanation]) -> list[dict[str, Any]]:
    """What `--json` prints."""
    return [
        {**asdict(graph), "layers": [_layer_json(layer) for layer in graph.layers]}
        for graph in graphs
    ]


def _layer_json(layer: ExplainedLayer) -> dict[str, Any]:
    return {**asdict(layer), "is_fused": layer.is_fused}


def print_explanations(graphs: Sequence[GraphExplanation], console: Console) -> None:
    """Prints a table of each graph, and at the end what is not known and why."""
    from rich.markup import escape

    for graph in graphs:
        _print_graph(graph, console)
    remarks: dict[str, list[str]] = {}
    for graph in graphs:
        for remark in graph.remarks:
            remarks.setdefault(remark, []).append(graph.graph)
    for remark, names in remarks.items():
        console.print(escape(f"{', '.join(names)}: {remark}"))


def _print_graph(graph: GraphExplanation, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    is_engine = graph.source == "engine"
    shown = [one for one in graph.layers if not one.is_helper and one.kind != _HIDDEN]
    table = Table(title=escape(f"{graph.graph}: {len(shown)} layers of its {graph.source}"))
    headings = ["layer", "ONNX nodes", "PyTorch modules", "gives", "reads"]
    for heading in (*headings, *(["tactic"] if is_engine else [])):
        table.add_column(heading, overflow="fold")
    for layer in shown:
        table.add_row(*map(escape, _cells(layer, with_tactic=is_engine)))
    console.print(table)
    for line in _summary(graph, len(graph.layers) - len(shown)):
        console.print(escape(f"  {line}"))


def _cells(layer: ExplainedLayer, *, with_tactic: bool) -> list[str]:
    between = " ... " if layer.is_stretch else "\n"
    nodes = [f"{op} {node}" for op, node in zip(layer.operators, layer.nodes, strict=True)]
    return [
        layer.kind or layer.layer,
        between.join(nodes) or "-",
        "\n".join(layer.modules) or "-",
        ", ".join(kind or "?" for kind in layer.outputs) or "?",
        ", ".join(layer.reads),
        *([layer.tactic or "?"] if with_tactic else []),
    ]


def _summary(graph: GraphExplanation, hidden: int) -> list[str]:
    if graph.source == "engine":
        fused = sum(layer.is_fused for layer in graph.layers)
        lines = [f"{fused} of {len(graph.layers)} layers compute several nodes"]
    else:
        lines = [f"not shown: {hidden} constants and layers that TensorRT's parser added"]
    kinds: dict[str, list[str]] = {}
    for layer in graph.attention:
        kinds.setdefault(_attention(layer), []).append(layer.node)
    lines += [f"attention {', '.join(nodes)}: {kind}" for kind, nodes in kinds.items()]
    if graph.without_layer:
        lines.append(f"nodes that no layer names: {', '.join(graph.without_layer)}")
    return lines


def _attention(layer: AttentionLayer) -> str:
    how = "one kernel" if layer.fused else f"decomposed ({layer.reason})"
    lengths = f", keys up to {layer.lengths}" if layer.lengths else ""
    return (
        f"{layer.dtype}, {layer.num_heads} heads over {layer.num_kv_heads}, head_dim "
        f"{layer.head_dim}, mask {layer.masking}{lengths}, {how}"
    )
