"""A mask that says for each query which rows of the cache it sees, in layers of TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.engines.shapes import dims

if TYPE_CHECKING:
    import tensorrt as trt
    from numpy.typing import NDArray

    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["add_visible_keys"]

_SEQUENCE_AXIS = 2  # of queries and keys [batch, num_heads, sequence_length, head_dim]


def add_visible_keys(
    bindings: Bindings,
    network: trt.INetworkDefinition,
    queries: trt.ITensor,
    lengths: trt.ITensor,
    capacity: int,
    *,
    causal: bool,
) -> trt.ITensor:
    """Adds layers that compute which keys each query sees.

    Key j is visible to query i of row b if j < lengths[b], and, if causal, if
    j <= lengths[b] - sequence_length + i: the last query sees the last valid key.

    Args:
        bindings: the TensorRT module.
        network: gets the layers.
        queries: [batch, num_heads, sequence_length, head_dim].
        lengths: int64 or int32 [batch], valid keys of each row.
        capacity: number of keys.
        causal: whether a query sees only keys up to its own.

    Returns:
        bool [batch, 1, sequence_length, capacity]; sequence_length is 1, which broadcasts, if not
        causal.
    """
    ops = bindings.ElementWiseOperation
    counts = network.add_cast(lengths, bindings.DataType.INT32).get_output(0)
    bound = _reshaped(bindings, network, counts, (-1, 1, 1, 1))
    if causal:
        offsets = _offsets(bindings, network, queries)
        bound = network.add_elementwise(bound, offsets, ops.SUM).get_output(0)
    keys = _constant(bindings, network, np.arange(capacity, dtype=np.int32).reshape(1, 1, 1, -1))
    return network.add_elementwise(keys, bound, ops.LESS).get_output(0)


def _offsets(
    bindings: Bindings, network: trt.INetworkDefinition, queries: trt.ITensor
) -> trt.ITensor:
    """For each query i, i + 1 - sequence_length: int32 [1, 1, sequence_length, 1]."""
    ops = bindings.ElementWiseOperation
    shape = network.add_shape(queries).get_output(0)
    axis, one = dims(bindings, (_SEQUENCE_AXIS,)), dims(bindings, (1,))
    length = network.add_slice(shape, axis, one, one).get_output(0)
    count = network.add_fill(
        dims(bindings, (0,)), bindings.FillOperation.LINSPACE, bindings.DataType.INT32
    )
    count.set_input(0, length)
    count.set_input(1, _constant(bindings, network, np.array(1, np.int32)))
    count.set_input(2, _constant(bindings, network, np.array([1], np.int32)))
    length32 = network.add_cast(length, bindings.DataType.INT32).get_output(0)
    offsets = network.add_elementwise(count.get_output(0), length32, ops.SUB).get_output(0)
    return _reshaped(bindings, network, offsets, (1, 1, -1, 1))


def _reshaped(
    bindings: Bindings, network: trt.INetworkDefinition, tensor: trt.ITensor, shape: tuple[int, ...]
) -> trt.ITensor:
    layer = network.add_shuffle(tensor)
    layer.reshape_dims = dims(bindings, shape)
    return layer.get_output(0)


def _constant(
    bindings: Bindings, network: trt.INetworkDefinition, values: NDArray[Any]
) -> trt.ITensor:
    shape, weights = dims(bindings, values.shape), bindings.Weights(values)
    return network.add_constant(shape, weights).get_output(0)
