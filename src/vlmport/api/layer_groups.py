"""Groups the layers of a graph by the blocks of the PyTorch model that they lie in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.calibration.layers import Layer

__all__ = ["LayerGroup", "layer_groups"]

# A vision tower of 4 or a decoder of 6 blocks is still ranked layer by layer.
_MOST_SINGLE_LAYERS = 24
# The path up to the first number, and the part of that block: "model.layers.7", "self_attn".
_PART_OF_BLOCK = re.compile(r"^((?:[^.]+\.)*?\d+\.[^.]+)\.")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that are quantized together, or kept in float together.

    Attributes:
        graph: name of their graph.
        name: the PyTorch path that they share ("model.layers.7.self_attn").
        layers: their names, unique in the graph.
        modules: the PyTorch modules whose weights they hold.
    """

    graph: str
    name: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]


def layer_groups(
    graph: str, layers: Sequence[Layer], *, single: bool = False
) -> tuple[LayerGroup, ...]:
    """One group a layer; in graphs of many layers one a part of a block.

    In a graph of more than 24 layers those are put together whose modules' names agree up to the
    first number and the name behind it: a block's attention, a block's feed-forward network.
    Layers outside of blocks, such as the output head, stay alone.

    Args:
        graph: name of the graph.
        layers: of that graph.
        single: one group a layer, however many there are.
    """
    one_each = single or len(layers) <= _MOST_SINGLE_LAYERS
    members: dict[str, list[Layer]] = {}
    for layer in layers:
        members.setdefault(layer.name if one_each else _part(layer), []).append(layer)
    return tuple(
        LayerGroup(
            graph,
            name,
            tuple(layer.name for layer in group),
            tuple(module for layer in group for module in layer.modules),
        )
        for name, group in members.items()
    )


def _part(layer: Layer) -> str:
    found = _PART_OF_BLOCK.match(layer.modules[0])
    return found[1] if found else layer.name
