"""Computes a tensor of a network on the host, so that a mask can be checked before it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vlmport.errors import EngineError
from vlmport.runtime.engines.network import layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import tensorrt as trt
    from numpy.typing import NDArray

    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["NetworkValues"]


class NetworkValues:
    """Values of a network's tensors, computed with numpy by the layers that a mask is made of."""

    def __init__(self, bindings: Bindings, network: trt.INetworkDefinition) -> None:
        self._bindings = bindings
        self._producers = {
            layer.get_output(index).name: layer
            for layer in layers(network)
            for index in range(layer.num_outputs)
        }
        kinds = bindings.LayerType
        self._rules: dict[trt.LayerType, Callable[[Any, list[NDArray[Any]]], NDArray[Any]]] = {
            kinds.CAST: self._cast,
            kinds.CONSTANT: self._constant,
            kinds.ELEMENTWISE: self._elementwise,
            kinds.FILL: self._fill,
            kinds.SHUFFLE: self._shuffle,
            kinds.SLICE: self._slice,
        }

    def value(
        self,
        tensor: trt.ITensor,
        known: Mapping[str, NDArray[Any]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> NDArray[Any]:
        """What a tensor holds.

        Args:
            tensor: of the network.
            known: name of a tensor that it is computed from -> its value.
            shapes: name of a tensor -> its shape, of those of which no more than that is needed.

        Raises:
            EngineError: if it depends on another tensor, or a layer that is not known here.
        """
        if tensor.name in known:
            return known[tensor.name]
        layer = self._producers.get(tensor.name)
        if layer is None:
            msg = (
                f"{tensor.name}: a mask depends on it; expected one of {', '.join(known)} only; "
                "the mask cannot be checked, so there is no engine"
            )
            raise EngineError(msg)
        if layer.type == self._bindings.LayerType.SHAPE:
            source = layer.get_input(0).name
            if source in shapes:
                return np.array(shapes[source], np.int64)
        rule = self._rules.get(layer.type)
        if rule is None:
            names = ", ".join(kind.name for kind in self._rules)
            msg = (
                f"{layer.name}: a mask is computed by a layer of type {layer.type.name}; expected "
                f"one of {names}; the mask cannot be checked, so there is no engine"
            )
            raise EngineError(msg)
        inputs = [
            self.value(layer.get_input(index), known, shapes) for index in range(layer.num_inputs)
        ]
        return rule(layer, inputs)

    def source(self, tensor: trt.ITensor) -> str:
        """Name of the tensor that this one is a plain cast of, or its own."""
        layer = self._producers.get(tensor.name)
        while layer is not None and layer.type == self._bindings.LayerType.CAST:
            tensor = layer.get_input(0)
            layer = self._producers.get(tensor.name)
        return str(tensor.name)

    def _cast(self, layer: trt.ILayer, inputs: list[NDArray[Any]]) -> NDArray[Any]:
        types = self._bindings.DataType
        numpy_types = {types.INT32: np.int32, types.INT64: np.int64, types.BOOL: np.bool_}
        target = layer.get_output(0).dtype
        if target not in numpy_types:
            raise self._unknown(layer, f"casts to {target}")
        return inputs[0].astype(numpy_types[target])

    def _constant(self, layer: trt.ILayer, inputs: list[NDArray[Any]]) -> NDArray[Any]:
        assert not inputs
        layer.__class__ = self._bindings.IConstantLayer
        constant = cast("trt.IConstantLayer", layer)
        values: NDArray[Any] = np.array(constant.weights)
        return values.reshape(constant.shape[:])

    def _elementwise(self, layer: trt.ILayer, inputs: list[NDArray[Any]]) -> NDArray[Any]:
        layer.__class__ = self._bindings.IElementWiseLayer
        operation = cast("trt.IElementWiseLayer", layer).op
        ops = self._bindings.ElementWiseOperation
        functions: dict[trt.ElementWiseOperation, np.ufunc] = {
            ops.AND: np.logical_and,
            ops.LESS: np.less,
            ops.SUB: np.subtract,
            ops.SUM: np.add,
        }
        if operation not in functions:
            raise self._unknown(layer, f"computes {operation}")
        result: NDArray[Any] = functions[operation](*inputs)
        return result

    def _fill(self, layer: trt.ILayer, inputs: list[NDArray[Any]]) -> NDArray[Any]:
        layer.__class__ = self._bindings.IFillLayer
        operation = cast("trt.IFillLayer", layer).operation
        if operation != self._bindings.FillOperation.LINSPACE or inputs[0].shape != (1,):
            raise self._unknown(layer, f"fills by {operation} into {inputs[0]}")
        length, start, step = inputs
        steps: NDArray[Any] = start + step[0] * np.arange(length[0])
        return steps.astype(np.int32)

    def _shuffle(self, layer: trt.ILayer, inputs: list[NDArray[Any]]) -> NDArray[Any]:
        layer.__class__ = self._bindings.IShuffleLayer
        shuffle = cast("trt.IShuffleLayer", layer)
        rank = inputs[0].ndim
        orders = [_order(one, rank) for one in (shuffle.first_transpose, shuffle.second_transpose)]
        shape = tuple(shuffle.reshape_dims)
        if len(inputs) != 1 or 0 in shape or any(order != sorted(order) for order in orders):
            raise self._unknown(layer, f"reshapes to {shape}")
        return inputs[0].reshape(shape)

    def _slice(self, layer: trt.ILayer, inputs: list[NDArray[Any]]) -> NDArray[Any]:
        layer.__class__ = self._bindings.ISliceLayer
        piece: Any = layer  # the stubs leave these attributes out
        if len(inputs) != 1 or inputs[0].ndim != 1:
            raise self._unknown(layer, f"slices an array of {inputs[0].ndim} axes")
        start, length, stride = piece.start[0], piece.shape[0], piece.stride[0]
        return inputs[0][start : start + length * stride : stride]

    def _unknown(self, layer: trt.ILayer, what: str) -> EngineError:
        return EngineError(
            f"{layer.name}: {what}, which is not known of masks; the mask cannot be checked, so "
            "there is no engine"
        )


def _order(permutation: trt.Permutation, rank: int) -> list[int]:
    return [permutation[axis] for axis in range(rank)]
