"""Finds out for which attention layers TensorRT has one kernel.

A layer that may be decomposed builds whether there is a kernel or not, and nothing says which it
became; one that may not fails where there is none. So a network of one such attention is built for
each kind of layer, in about 0.1 s.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.errors import EngineError
from vlmport.runtime.engines.attention_layers import attention_layers
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.shapes import dims, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import tensorrt as trt

    from vlmport.contract_engines import EngineProfile
    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["AttentionKind", "KernelFinder", "attention_kind"]

Shape = tuple[int, ...]  # -1 for an axis with a range
Bounds = tuple[int, int, int]

_DYNAMIC = -1
_STDERR = 2  # file descriptor
_WORDS = re.compile(r"(Attention operation was not supported by a dedicated kernel)")
# For a graph whose ports do not say how many tokens there are.
_ANY_TOKENS: Bounds = (1, 16, 64)


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What decides about the kernel of an attention layer.

    Attributes:
        dtype: name of the element type in TensorRT.
        queries: shape [batch, num_heads, sequence_length, head_dim].
        keys: shape.
        values: shape.
        masking: name of the causal kind.
        has_lengths: whether the keys are bounded.
        mask: shape of the mask; None without one.
        batch: bounds of the first axis, for each profile.
        tokens: bounds of the third axis, for each profile.
    """

    dtype: str
    queries: Shape
    keys: Shape
    values: Shape
    masking: str
    has_lengths: bool
    mask: Shape | None
    batch: tuple[Bounds, ...]
    tokens: tuple[Bounds, ...]


def attention_kind(
    layer: trt.IAttentionInputLayer, profiles: Sequence[EngineProfile]
) -> AttentionKind:
    """What decides about the kernel of a layer whose attention is complete."""
    attention = layer.attention
    queries, keys, values = (layer.get_input(index) for index in range(3))
    mask = attention.mask
    return AttentionKind(
        dtype=queries.dtype.name,
        queries=shape_of(queries),
        keys=shape_of(keys),
        values=shape_of(values),
        masking=attention.causal_kind.name,
        has_lengths=attention.key_value_lengths is not None,
        mask=None if mask is None else shape_of(mask),
        batch=tuple(_bounds(profile, first=True) for profile in profiles),
        tokens=tuple(_bounds(profile, first=False) for profile in profiles),
    )


def _bounds(profile: EngineProfile, *, first: bool) -> Bounds:
    """Of the first axis of the first port, or of the first other axis that has a range."""
    port = profile.ranges[0] if profile.ranges else None
    if port is None:
        return (1, 1, 1)
    axes = list(zip(port.smallest, port.usual, port.largest, strict=True))
    if first:
        return axes[0]
    fixed = profile.name == "decode"
    ranged = [axis for axis in axes[1:] if axis[0] < axis[2]]
    return (1, 1, 1) if fixed else next(iter(ranged), _ANY_TOKENS)


class KernelFinder:
    """Remembers for each kind of attention whether TensorRT has a kernel for it."""

    def __init__(
        self, bindings: Bindings, new_config: Callable[[trt.Builder], trt.IBuilderConfig]
    ) -> None:
        self._bindings = bindings
        self._new_config = new_config
        self._reasons: dict[AttentionKind, str] = {}

    def decompose_where_needed(
        self, network: trt.INetworkDefinition, profiles: Sequence[EngineProfile]
    ) -> dict[str, str]:
        """Lets those layers be decomposed that have no kernel, and no others.

        Returns:
            Layer name -> why, of those that are decomposed.

        Raises:
            EngineError: if TensorRT builds a layer neither way.
        """
        reasons = {}
        for layer in attention_layers(self._bindings, network):
            reason = self.reason(attention_kind(layer, profiles))
            layer.attention.decomposable = bool(reason)
            if reason:
                reasons[layer.name] = reason
        return reasons

    def reason(self, kind: AttentionKind) -> str:
        """Why there is no kernel, in TensorRT's words; "" if there is one.

        Raises:
            EngineError: if TensorRT does not build it decomposed either.
        """
        if kind not in self._reasons:
            reason = self._attempt(kind, decomposable=False)
            if reason and (other := self._attempt(kind, decomposable=True)):
                heads, head_dim = kind.queries[1], kind.queries[3]
                msg = (
                    f"attention of {heads} heads of {head_dim} ({kind.dtype}): {other}; expected "
                    "that TensorRT builds it; choose another precision or compute capability"
                )
                raise EngineError(msg)
            self._reasons[kind] = reason
        return self._reasons[kind]

    def _attempt(self, kind: AttentionKind, *, decomposable: bool) -> str:
        with listening() as log:
            builder = self._bindings.Builder(engine_logger(self._bindings))
            network = self._one_attention(builder, kind, decomposable=decomposable)
            config = self._new_config(builder)
            for batch, tokens in zip(kind.batch, kind.tokens, strict=True):
                config.add_optimization_profile(
                    _profile(self._bindings, builder, network, batch, tokens)
                )
            with _quiet():
                plan = builder.build_serialized_network(network, config)
            if plan is not None:
                return ""
            found = _WORDS.search(log.reason)
            return found[1] if found else log.reason

    def _one_attention(
        self, builder: trt.Builder, kind: AttentionKind, *, decomposable: bool
    ) -> trt.INetworkDefinition:
        """A network of nothing but the attention."""
        bindings = self._bindings
        types = bindings.DataType
        flag = bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        dtype = getattr(types, kind.dtype)
        shapes = {"queries": kind.queries, "keys": kind.keys, "values": kind.values}
        queries, keys, values = (
            network.add_input(name, dtype, dims(bindings, shape)) for name, shape in shapes.items()
        )
        kind_of_mask = getattr(bindings.CausalMaskKind, kind.masking)
        softmax = bindings.AttentionNormalizationOp.SOFTMAX
        attention = network.add_attention_v2(queries, keys, values, softmax, kind_of_mask)
        attention.decomposable = decomposable
        if kind.has_lengths:
            shape = dims(bindings, kind.queries[:1])
            attention.key_value_lengths = network.add_input("lengths", types.INT32, shape)
        if kind.mask is not None:
            attention.mask = network.add_input("mask", types.BOOL, dims(bindings, kind.mask))
        network.mark_output(attention.get_output(0))
        return network


_stderr_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TensorRT's compiler from writing "Internal Error" to stderr, past every logger.

    It says so where there is no kernel, which is what is asked here. What others wrote meanwhile
    is passed on.
    """
    with _stderr_lock, tempfile.TemporaryFile() as kept:
        outside = os.dup(_STDERR)
        os.dup2(kept.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(outside, _STDERR)
            os.close(outside)
            kept.seek(0)
            for line in kept:
                if not line.startswith(b"Internal Error: Myelin"):
                    os.write(_STDERR, line)


def _profile(
    bindings: Bindings,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    batch: Bounds,
    tokens: Bounds,
) -> trt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        port = network.get_input(index)
        shape = shape_of(port)
        if _DYNAMIC not in shape:
            continue
        least, usual, most = (
            dims(
                bindings,
                [
                    length if length != _DYNAMIC else (batch if axis == 0 else tokens)[which]
                    for axis, length in enumerate(shape)
                ],
            )
            for which in range(3)
        )
        profile.set_shape(port.name, least, usual, most)
    return profile
