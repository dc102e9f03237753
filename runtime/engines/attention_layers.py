"""The attention layers of a parsed network, each beside the node that it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from vlmport.errors import EngineError
from vlmport.runtime.engines.network import layers

if TYPE_CHECKING:
    import tensorrt as trt

    from vlmport.contract_engines import AttentionNode, EngineSource
    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["attention_layers", "paired_layers"]

_SUFFIX = "_AttentionInput"  # that the parser puts behind a node's name


def attention_layers(
    bindings: Bindings, network: trt.INetworkDefinition
) -> list[trt.IAttentionInputLayer]:
    """The layers at which attention begins; each has an `attention`."""
    found = []
    for layer in layers(network):
        if layer.type == bindings.LayerType.ATTENTION_INPUT:
            # The bindings hand out base classes; this is how they say one becomes its own.
            layer.__class__ = bindings.IAttentionInputLayer
            found.append(cast("trt.IAttentionInputLayer", layer))
    return found


def paired_layers(
    bindings: Bindings, network: trt.INetworkDefinition, source: EngineSource
) -> list[tuple[trt.IAttentionInputLayer, AttentionNode]]:
    """Every attention layer with its node.

    Raises:
        EngineError: if a node has no layer, or a layer no node.
    """
    nodes = {node.name: node for node in source.attention}
    found = {_node_name(layer): layer for layer in attention_layers(bindings, network)}
    lost, unknown = sorted(nodes.keys() - found), sorted(found.keys() - nodes)
    count = len(attention_layers(bindings, network))
    if lost or unknown or count != len(nodes):
        msg = (
            f"{source.graph}: {len(nodes)} attention nodes became {count} attention layers; "
            f"nodes without a layer: {', '.join(lost) or 'none'}; layers without a node: "
            f"{', '.join(unknown) or 'none'}; expected one layer for each node"
        )
        raise EngineError(msg)
    return [(layer, nodes[name]) for name, layer in found.items()]


def _node_name(layer: trt.IAttentionInputLayer) -> str:
    return layer.name.removesuffix(_SUFFIX)
