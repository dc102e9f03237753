"""The values inside of a graph, in the order of computation, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.calibration.node_modules import node_module
from vlmport.graphs.value_types import infer_types

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir

__all__ = ["InnerValue", "in_groups", "inner_values"]

_UNKNOWN_AXIS = 1024  # elements of an axis of which nothing is known


@dataclass(frozen=True, slots=True)
class InnerValue:
    """A result of a node.

    Attributes:
        name: of the value.
        node: name of the node that computes it.
        operator: the node's.
        module: the PyTorch module that the node came from; "" if that is not known.
        sources: names of the values that the node reads, weights left out.
        shape: lengths of the axes, or their names; None if the shape is not known.
        is_output: whether it is an output of the graph as it is.
    """

    name: str
    node: str
    operator: str
    module: str
    sources: tuple[str, ...]
    shape: tuple[int | str, ...] | None
    is_output: bool


def inner_values(model: ir.Model) -> tuple[InnerValue, ...]:
    """All results of nodes that hang on an input of the graph, the graph's outputs among them.

    Args:
        model: its values get element types and, as far as they can be told, shapes.
    """
    infer_types(model)
    living = {str(value.name) for value in model.graph.inputs}
    found = []
    for node in model.graph:
        sources = tuple(
            str(value.name)
            for value in node.inputs
            if value is not None and str(value.name) in living
        )
        if not sources:
            continue
        for value in node.outputs:
            if value.name:
                living.add(value.name)
                found.append(_inner(node, value, sources))
    return tuple(found)


def _inner(node: ir.Node, value: ir.Value, sources: tuple[str, ...]) -> InnerValue:
    shape = None
    if value.shape is not None:
        shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    return InnerValue(
        name=str(value.name),
        node=str(node.name),
        operator=node.op_type,
        module=node_module(node),
        sources=sources,
        shape=shape,
        is_output=value.is_graph_output(),
    )


def in_groups(
    values: Sequence[InnerValue], lengths: Mapping[str, int], most_elements: int
) -> Iterator[tuple[InnerValue, ...]]:
    """Cuts values into runs that fit into memory together.

    Args:
        values: in order.
        lengths: of named axes, in the run to come.
        most_elements: of a group; a group has one value at least.
    """
    group: list[InnerValue] = []
    elements = 0
    for value in values:
        size = _elements(value, lengths)
        if group and elements + size > most_elements:
            yield tuple(group)
            group, elements = [], 0
        group.append(value)
        elements += size
    if group:
        yield tuple(group)


def _elements(value: InnerValue, lengths: Mapping[str, int]) -> int:
    count = 1
    for axis in value.shape or (_UNKNOWN_AXIS, _UNKNOWN_AXIS):
        count *= axis if isinstance(axis, int) else lengths.get(axis, _UNKNOWN_AXIS)
    return count
