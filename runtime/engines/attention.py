"""Tells a parsed network what its attention layers mean, which the parser keeps only in part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import EngineError
from vlmport.runtime.engines.attention_layers import paired_layers
from vlmport.runtime.engines.explicit_mask import add_visible_keys
from vlmport.runtime.engines.network import tensors

if TYPE_CHECKING:
    from typing import Literal

    import tensorrt as trt

    from vlmport.contract_engines import AttentionNode, EngineSource
    from vlmport.runtime.engines.bindings import Bindings

    Layer = trt.IAttentionInputLayer

__all__ = ["complete_attention"]

_KEYS, _CAPACITY_AXIS = 1, 2


def complete_attention(
    bindings: Bindings,
    network: trt.INetworkDefinition,
    source: EngineSource,
    masking: Literal["lengths", "mask"],
) -> None:
    """Gives every attention layer over a cache its valid lengths and the kind of its mask.

    The parser drops nonpad_kv_seqlen without a word if it is computed, and imports is_causal as a
    mask that is aligned to the first row of the cache; ONNX aligns it to the last valid one. An
    engine of such a network computes nonsense.

    Args:
        bindings: the TensorRT module.
        network: as parsed; is changed.
        source: the graph that it was parsed from.
        masking: "lengths" tells a layer the lengths; "mask" gives it an explicit mask. A layer
            with a mask of its own gets an explicit one either way.

    Raises:
        EngineError: if a layer cannot be told what its node means.
    """
    writer = _Writer(bindings, network, source.graph)
    for layer, node in paired_layers(bindings, network, source):
        if not node.lengths:
            continue  # all keys are valid, and the parser keeps masks and plain attention
        if masking == "mask" or node.mask:
            writer.set_mask(layer, node)
        else:
            writer.set_lengths(layer, node)


class _Writer:
    """Adds tensors to a network once, however many layers read them."""

    def __init__(self, bindings: Bindings, network: trt.INetworkDefinition, graph: str) -> None:
        self._bindings = bindings
        self._network = network
        self._graph = graph
        self._tensors = tensors(network)
        self._lengths: dict[str, trt.ITensor] = {}
        self._masks: dict[tuple[str, bool, int], trt.ITensor] = {}

    def set_lengths(self, layer: Layer, node: AttentionNode) -> None:
        if node.lengths not in self._lengths:
            int32 = self._bindings.DataType.INT32
            counts = self._network.add_cast(self._find(node), int32).get_output(0)
            counts.name = f"{node.lengths}_int32"
            self._lengths[node.lengths] = counts
        kinds = self._bindings.CausalMaskKind
        layer.attention.key_value_lengths = self._lengths[node.lengths]
        layer.attention.causal_kind = kinds.LOWER_RIGHT if node.causal else kinds.NONE

    def set_mask(self, layer: Layer, node: AttentionNode) -> None:
        mask = self._visible_keys(layer, node)
        if node.mask:
            own = layer.attention.mask
            if own is None or own.dtype != self._bindings.DataType.BOOL:
                msg = (
                    f"{self._graph}: {layer.name}: its mask {node.mask} is "
                    f"{'missing' if own is None else own.dtype}; expected bool, which can be "
                    "joined with the valid lengths"
                )
                raise EngineError(msg)
            both = self._bindings.ElementWiseOperation.AND
            mask = self._network.add_elementwise(own, mask, both).get_output(0)
        # A layer takes a mask or a kind of mask, not both.
        layer.attention.causal_kind = self._bindings.CausalMaskKind.NONE
        layer.attention.mask = mask

    def _visible_keys(self, layer: Layer, node: AttentionNode) -> trt.ITensor:
        """One mask for all layers with the same lengths, queries and cache."""
        capacity = int(layer.get_input(_KEYS).shape[_CAPACITY_AXIS])
        if capacity < 0:
            msg = (
                f"{self._graph}: {layer.name}: the number of its keys is not fixed; expected a "
                "cache of fixed capacity"
            )
            raise EngineError(msg)
        key = (node.lengths, node.causal, capacity)
        if key not in self._masks:
            mask = add_visible_keys(
                self._bindings,
                self._network,
                layer.get_input(0),
                self._find(node),
                capacity,
                causal=node.causal,
            )
            mask.name = f"{node.lengths}_mask_{len(self._masks)}"
            self._masks[key] = mask
        return self._masks[key]

    def _find(self, node: AttentionNode) -> trt.ITensor:
        if node.lengths not in self._tensors:
            msg = (
                f"{self._graph}: {node.name}: the parsed network has no tensor {node.lengths}, "
                "which says how many keys are valid; there is no engine without it"
            )
            raise EngineError(msg)
        return self._tensors[node.lengths]
