"""The nodes that TensorRT is given of a graph, with the PyTorch modules that they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.calibration.node_modules import node_module
from vlmport.graphs.tensorrt_form import rewrite_for_tensorrt_

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["GraphNodes"]


@dataclass(frozen=True, slots=True)
class _Node:
    operator: str
    module: str  # several are joined by ", "


class GraphNodes:
    """Names of nodes and what is known of them.

    Args:
        path: <graph>.onnx of a bundle.
    """

    def __init__(self, path: Path) -> None:
        model = ir.load(path)
        rewrite_for_tensorrt_(model)
        self._nodes = {
            str(node.name): _Node(node.op_type, node_module(node)) for node in model.graph
        }

    def __contains__(self, name: str) -> bool:
        """Whether the graph has a node of this name."""
        return name in self._nodes

    def names(self) -> tuple[str, ...]:
        """All nodes, in order."""
        return tuple(self._nodes)

    def operators(self, names: Iterable[str]) -> tuple[str, ...]:
        """The operators of nodes; "?" for a name that the graph has not."""
        return tuple(self._nodes[one].operator if one in self._nodes else "?" for one in names)

    def modules(self, names: Iterable[str]) -> tuple[str, ...]:
        """The modules of nodes, each once, in the order of the nodes."""
        found = (self._nodes[name].module.split(", ") for name in names if name in self._nodes)
        return tuple(dict.fromkeys(one for modules in found for one in modules if one))

    def without(self, seen: Iterable[str]) -> tuple[str, ...]:
        """Nodes that are not among these."""
        known = set(seen)
        return tuple(name for name in self._nodes if name not in known)
