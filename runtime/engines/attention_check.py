"""Compares every attention layer of a network with the node that it came from, before it is built.

An engine with a wrong mask builds, runs and answers nonsense. So what `attention.py` did is not
believed here: masks, lengths and alignment are read back from the network, and a mask that layers
compute is computed on the host and compared with what the node means.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlmport.contract_engines import AttentionLayer
from vlmport.errors import EngineError
from vlmport.runtime.engines.attention_layers import paired_layers
from vlmport.runtime.engines.network_values import NetworkValues
from vlmport.runtime.engines.ports import type_name
from vlmport.runtime.engines.shapes import shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import tensorrt as trt
    from numpy.typing import NDArray

    from vlmport.contract_engines import AttentionNode, EngineSource
    from vlmport.runtime.engines.bindings import Bindings

    Layer = trt.IAttentionInputLayer

__all__ = ["check_attention", "visible_keys"]

_QUERIES, _KEYS = 0, 1
_CAPACITY_AXIS = 2
_SEQUENCE_LENGTHS = (1, 3)  # at which an explicit mask is compared: a step, and a prompt


def check_attention(
    bindings: Bindings,
    network: trt.INetworkDefinition,
    source: EngineSource,
    reasons: Mapping[str, str],
) -> tuple[AttentionLayer, ...]:
    """Reads every attention layer back.

    Args:
        bindings: the TensorRT module.
        network: complete; it is only read.
        source: the graph that it stands for.
        reasons: layer name -> why it is decomposed.

    Returns:
        What each layer does, in the network's order.

    Raises:
        EngineError: names every layer that would not compute what its node means, and how.
    """
    pairs = paired_layers(bindings, network, source)
    checker = _Checker(bindings, network, pairs)
    faults = [
        f"{layer.name}: {fault}" for layer, node in pairs for fault in checker.faults(layer, node)
    ]
    if faults:
        msg = (
            f"{source.graph}: {'; '.join(faults)}; the engine would compute another attention "
            "than the graph, so there is none; this is a fault of vlmport or of TensorRT's parser"
        )
        raise EngineError(msg)
    return tuple(checker.layer(layer, node, reasons) for layer, node in pairs)


class _Checker:
    """Says what is wrong with one attention layer after the other."""

    def __init__(
        self,
        bindings: Bindings,
        network: trt.INetworkDefinition,
        pairs: Sequence[tuple[Layer, AttentionNode]],
    ) -> None:
        self._bindings = bindings
        self._values = NetworkValues(bindings, network)
        # Queries of all layers over one cache are as many, so that their masks may be one tensor.
        self._queries: dict[str, list[trt.ITensor]] = {}
        for layer, node in pairs:
            self._queries.setdefault(node.lengths, []).append(layer.get_input(_QUERIES))
        self._compared: dict[tuple[str, AttentionNode, int], list[str]] = {}

    def faults(self, layer: Layer, node: AttentionNode) -> Iterator[str]:
        attention = layer.attention
        padded = self._bindings.AttentionIOForm.PADDED_BHND
        if (attention.query_form, attention.key_value_form) != (padded, padded):
            yield "its queries or keys are not [batch, num_heads, sequence_length, head_dim]"
        if attention.norm_op != self._bindings.AttentionNormalizationOp.SOFTMAX:
            yield f"its weights are normalized by {attention.norm_op}; expected SOFTMAX"
        if not node.lengths:
            yield from self._faults_without_lengths(attention, node)
        elif attention.mask is None:
            yield from self._faults_of_lengths(attention, node)
        else:
            yield from self._faults_of_mask(layer, node)

    def _faults_without_lengths(
        self, attention: trt.IAttention, node: AttentionNode
    ) -> Iterator[str]:
        """All keys are valid; the node has a mask, or every query sees them all."""
        if node.causal:
            yield "is causal over keys of unknown number; expected a node that names valid lengths"
        elif (kind := attention.causal_kind) != self._bindings.CausalMaskKind.NONE:
            yield f"has a mask of kind {kind.name}; expected none"
        if (lengths := attention.key_value_lengths) is not None:
            yield f"has the lengths {lengths.name}; expected none, since all keys are valid"
        found = "" if attention.mask is None else attention.mask.name
        if found != node.mask:
            yield f"has {_named('mask', found)}; expected {_named('mask', node.mask)}"

    def _faults_of_lengths(self, attention: trt.IAttention, node: AttentionNode) -> Iterator[str]:
        kinds = self._bindings.CausalMaskKind
        expected = kinds.LOWER_RIGHT if node.causal else kinds.NONE
        if (kind := attention.causal_kind) != expected:
            yield f"has a mask of kind {kind.name}; expected {expected.name}"
        if node.mask:
            yield f"has no mask; expected {node.mask}"
        lengths = attention.key_value_lengths
        if lengths is None:
            yield f"has neither lengths nor a mask; expected the lengths {node.lengths}"
            return
        if (found := self._values.source(lengths)) != node.lengths:
            yield f"has the lengths {found}; expected {node.lengths}"
        if lengths.dtype != self._bindings.DataType.INT32 or len(shape_of(lengths)) != 1:
            yield f"has lengths {lengths.dtype} {shape_of(lengths)}; expected INT32 [batch]"

    def _faults_of_mask(self, layer: Layer, node: AttentionNode) -> Iterator[str]:
        attention = layer.attention
        if (kind := attention.causal_kind) != self._bindings.CausalMaskKind.NONE:
            yield f"has a mask and a mask of kind {kind.name}; expected NONE beside a mask"
        if attention.key_value_lengths is not None:
            yield f"has a mask and the lengths {attention.key_value_lengths.name}; expected one"
        if attention.mask.dtype != self._bindings.DataType.BOOL:
            yield f"has a mask of type {attention.mask.dtype}; expected BOOL"
            return
        capacity = int(layer.get_input(_KEYS).shape[_CAPACITY_AXIS])
        key = (attention.mask.name, replace(node, name=""), capacity)
        if key not in self._compared:
            self._compared[key] = list(self._mask_differences(attention.mask, node, capacity))
        yield from self._compared[key]

    def _mask_differences(
        self, mask: trt.ITensor, node: AttentionNode, capacity: int
    ) -> Iterator[str]:
        """An explicit mask computed on the host, beside what the node means by it."""
        generator = np.random.default_rng(0)
        for length in _SEQUENCE_LENGTHS:
            lengths = np.array(sorted({length, (length + capacity) // 2, capacity}), np.int64)
            shape = (len(lengths), 1, length, capacity)
            own = generator.random(shape) < 0.5 if node.mask else np.ones(shape, np.bool_)
            known: dict[str, NDArray[np.generic]] = {node.lengths: lengths}
            if node.mask:
                known[node.mask] = own
            shapes = {
                one.name: (len(lengths), int(one.shape[1]), length, int(one.shape[3]))
                for one in self._queries[node.lengths]
            }
            found = self._values.value(mask, known, shapes)
            expected = own & visible_keys(lengths, length, capacity, causal=node.causal)
            if np.broadcast_to(found, expected.shape).tolist() != expected.tolist():
                yield (
                    f"its mask {mask.name} is wrong for {length} queries and "
                    f"{capacity} keys; expected keys up to "
                    f"{'the query' if node.causal else 'the last valid one'}"
                )

    def layer(
        self, layer: Layer, node: AttentionNode, reasons: Mapping[str, str]
    ) -> AttentionLayer:
        attention = layer.attention
        masking: Literal["none", "lower_right", "tensor"] = "none"
        if attention.mask is not None:
            masking = "tensor"
        elif attention.causal_kind == self._bindings.CausalMaskKind.LOWER_RIGHT:
            masking = "lower_right"
        queries, keys = layer.get_input(_QUERIES), layer.get_input(_KEYS)
        lengths = attention.key_value_lengths
        return AttentionLayer(
            layer=layer.name,
            node=node.name,
            dtype=type_name(queries.dtype),
            num_heads=int(queries.shape[1]),
            num_kv_heads=int(keys.shape[1]),
            head_dim=int(queries.shape[3]),
            masking=masking,
            lengths="" if lengths is None else str(lengths.name),
            fused=not attention.decomposable,
            reason=reasons.get(layer.name, ""),
        )


def visible_keys(
    lengths: NDArray[np.int64], sequence_length: int, capacity: int, *, causal: bool
) -> NDArray[np.bool_]:
    """The mask [batch, 1, sequence_length, capacity] as ONNX defines nonpad_kv_seqlen."""
    visible = np.zeros((len(lengths), 1, sequence_length, capacity), np.bool_)
    for row, valid in enumerate(lengths):
        for query in range(sequence_length):
            most = valid - sequence_length + query + 1 if causal else valid
            visible[row, 0, query, : max(most, 0)] = True
    return visible


def _named(what: str, name: str) -> str:
    return f"the {what} {name}" if name else f"no {what}"
