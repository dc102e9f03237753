"""The element type in which a checkpoint's graphs compute."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from vlmport.contract import IMAGE_GRAPHS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmport.contract import Precision
    from vlmport.export.family import ExportPlan
    from vlmport.export.tracing import GraphPort, TracedModule

__all__ = ["TORCH_DTYPES", "default_dtype", "graph_in_precision", "in_precision"]

TORCH_DTYPES: MappingProxyType[Precision, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes `dtype` the one of modules that are built inside, as `from_pretrained(dtype=)` does.

    Buffers that transformers computes in float32 whatever the model's dtype (rotary frequencies)
    stay in float32, which a later `module.to(dtype)` would not leave them.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_precision(plan: ExportPlan, precision: Precision) -> ExportPlan:
    """The same plan with graphs that compute in another element type.

    Values that pass from graph to graph and the cache take that type. What the runtime makes of a
    picture stays float32 at the border and is cast inside, where transformers casts it; logits
    leave as float32, as transformers' `generate` reads them.

    Args:
        plan: as a family made it, in float32.
        precision: name of the element type.
    """
    passed_on = {port.name for graph in plan.graphs for port in graph.outputs}
    graphs = tuple(graph_in_precision(graph, precision, passed_on) for graph in plan.graphs)
    return replace(plan, graphs=graphs, kv_layout=replace(plan.kv_layout, dtype=precision))


def graph_in_precision(
    graph: TracedModule, precision: Precision, passed_on: set[str]
) -> TracedModule:
    """One graph of a plan in another element type; see `in_precision`.

    Args:
        graph: in float32.
        precision: name of the element type.
        passed_on: names of what any graph of the plan gives out.
    """
    dtype = TORCH_DTYPES[precision]
    from_pictures = {
        port.name
        for port in graph.inputs
        if graph.name in IMAGE_GRAPHS and port.name not in passed_on
    }
    kept = from_pictures | {"logits"}
    return replace(
        graph,
        dtype=dtype,
        inputs=tuple(_port_in(port, dtype, kept) for port in graph.inputs),
        outputs=tuple(_port_in(port, dtype, kept) for port in graph.outputs),
    )


def _port_in(port: GraphPort, dtype: torch.dtype, kept: set[str]) -> GraphPort:
    if port.dtype != torch.float32 or port.name in kept:
        return port
    return replace(port, dtype=dtype)
