"""Explains a parsed network, which needs no GPU: what each layer came from, and its precision."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vlmport.api.explain_report import ExplainedLayer
from vlmport.runtime.engines.network import layers
from vlmport.runtime.engines.ports import type_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import tensorrt as trt

    from vlmport.api.explain_nodes import GraphNodes
    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["explain_network", "nodes_of_metadata"]

# What TensorRT's parser writes into the metadata of a layer; a fused one has several, with a unit
# separator between them.
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_ATTENTION = "_AttentionInput"  # that the parser puts behind a node's name


def nodes_of_metadata(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes that a layer's metadata names, each once."""
    return tuple(dict.fromkeys(_METADATA.findall(metadata)))


def explain_network(
    bindings: Bindings, network: trt.INetworkDefinition, nodes: GraphNodes
) -> tuple[ExplainedLayer, ...]:
    """Every layer of a parsed network, in its order."""
    found = list(layers(network))
    named = {layer.name: _named_nodes(layer, nodes) for layer in found}
    readers = _readers(found)
    makers = {output.name: layer for layer in found for output in _outputs(layer)}
    return tuple(_explained(bindings, layer, named, readers, makers, nodes) for layer in found)


def _explained(
    bindings: Bindings,
    layer: trt.ILayer,
    named: Mapping[str, tuple[str, ...]],
    readers: Mapping[str, list[str]],
    makers: Mapping[str, trt.ILayer],
    nodes: GraphNodes,
) -> ExplainedLayer:
    own = named[layer.name]
    names = own or _nodes_of_readers(layer.name, named, readers)
    return ExplainedLayer(
        layer=layer.name,
        kind=layer.type.name,
        nodes=names,
        operators=nodes.operators(names),
        modules=nodes.modules(names),
        is_helper=not own,
        outputs=tuple(type_name(output.dtype) for output in _outputs(layer)),
        reads=tuple(_dequantized(bindings, layer, makers)),
    )


def _named_nodes(layer: trt.ILayer, nodes: GraphNodes) -> tuple[str, ...]:
    found = nodes_of_metadata(layer.metadata)
    if found:
        return found
    begun = layer.name.removesuffix(_ATTENTION)
    return (begun,) if begun != layer.name and begun in nodes else ()


def _readers(found: Iterable[trt.ILayer]) -> dict[str, list[str]]:
    """Layer -> the layers that read one of its outputs."""
    of_tensor: dict[str, list[str]] = {}
    for layer in found:
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None:
                of_tensor.setdefault(tensor.name, []).append(layer.name)
    return {
        layer.name: [name for one in _outputs(layer) for name in of_tensor.get(one.name, [])]
        for layer in found
    }


def _nodes_of_readers(
    layer: str, named: Mapping[str, tuple[str, ...]], readers: Mapping[str, list[str]]
) -> tuple[str, ...]:
    """The nodes that a layer without any was added for: those that read it, over others like it."""
    names: dict[str, None] = {}
    waiting, seen = list(readers[layer]), {layer}
    while waiting:
        reader = waiting.pop(0)
        if reader in seen:
            continue
        seen.add(reader)
        names |= dict.fromkeys(named[reader])
        if not named[reader]:
            waiting += readers[reader]
    return tuple(names)


def _dequantized(
    bindings: Bindings, layer: trt.ILayer, makers: Mapping[str, trt.ILayer]
) -> Iterable[str]:
    """Types of what a layer reads through a dequantization, turned on the way or not."""
    kinds = bindings.LayerType
    if layer.type in (kinds.DEQUANTIZE, kinds.SHUFFLE):
        return
    for index in range(layer.num_inputs):
        tensor = layer.get_input(index)
        maker = makers.get(tensor.name) if tensor is not None else None
        while maker is not None and maker.type == kinds.SHUFFLE:
            maker = makers.get(maker.get_input(0).name)
        if maker is not None and maker.type == kinds.DEQUANTIZE:
            yield type_name(maker.get_input(0).dtype)


def _outputs(layer: trt.ILayer) -> list[trt.ITensor]:
    return [layer.get_output(index) for index in range(layer.num_outputs)]
