"""Lets a float32 graph compute in half precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.graphs.float32_regions import is_parameter
from vlmport.graphs.half_tensors import narrowed
from vlmport.graphs.value_types import (
    float_inputs,
    float_outputs,
    infer_types,
    is_float32,
    moved_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from vlmport.graphs.half_tensors import HalfType

__all__ = ["ConvertPrecisionPass"]


class ConvertPrecisionPass(ir.passes.InPlacePass):
    """Gives every float32 node but chosen ones a half-precision type, and casts between the two.

        x -> MatMul(w) -> Norm -> y   =>   Cast(half) -> MatMul(half w) -> Cast(float) -> Norm -> y
                                           (Norm, x and y are chosen to stay float32)

    - A node that only moves elements has the type of what it moves, so that no casts stand around
      it; a cache has the type of its port, and attention that reads a float32 cache is float32,
      which spares the cast of the whole cache in each step.
    - A value is cast once for all its readers; a pair of casts that undo each other cannot arise,
      since a value has one type and a cast leads to the other one.
    - A parameter is stored in half precision, and cast up where a float32 node reads it, as
      transformers reads its half-precision weights. A constant of the graph (an epsilon, rotary
      frequencies) is stored in the type of its readers.
    - Values of weights are cast when they are asked for (`ir.LazyTensor`).

    Args of the constructor:
        dtype: the half-precision type.
        float32_nodes: nodes that stay float32.
        float32_ports: names of the inputs and outputs that stay float32; a past and its present
            cache alike.
        float32_weights: names of the parameters that are stored as float32, since the half type
            cannot hold them; their readers must be among `float32_nodes`.

    Raises:
        GraphError: if a value has no element type or a node holds a graph of its own.

    Refuses when:
      1. nothing in the graph is float32.
    """

    def __init__(
        self,
        dtype: HalfType,
        float32_nodes: Collection[ir.Node] = (),
        float32_ports: Collection[str] = (),
        float32_weights: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.dtype = ir.DataType[dtype]
        self.float32_nodes = frozenset(float32_nodes)
        self.float32_ports = frozenset(float32_ports)
        self.float32_weights = frozenset(float32_weights)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether a type was changed."""
        infer_types(model)
        nodes = [n for n in model.graph if float_inputs(n) or float_outputs(n)]
        ports = [v for v in (*model.graph.inputs, *model.graph.outputs) if is_float32(v)]
        types = self._types(model, nodes)
        plan = _Plan(model, self.dtype, types)
        weights = [v for v in model.graph.initializers.values() if is_float32(v)]
        reads = {node: float_inputs(node) for node in nodes}
        makes = {node: float_outputs(node) for node in nodes}
        outputs = [value for value in model.graph.outputs if is_float32(value)]
        for value in model.graph.inputs:
            if is_float32(value):
                value.type = ir.TensorType(self._port(value))
        for node in nodes:
            for value in makes[node]:
                value.type = ir.TensorType(types[node])
            if node.op_type == "Cast" and makes[node]:
                node.attributes["to"] = ir.AttrInt64("to", int(types[node]))
        for weight in weights:
            self._convert_weight(plan, weight)
        for node in nodes:
            for value in dict.fromkeys(reads[node]):
                plan.read_as(node, value, types[node])
        for value in dict.fromkeys(outputs):
            plan.hand_out(value, self._port(value))
        return ir.passes.PassResult(model, bool(nodes or ports))

    def _port(self, value: ir.Value) -> ir.DataType:
        return ir.DataType.FLOAT if value.name in self.float32_ports else self.dtype

    def _types(self, model: ir.Model, nodes: list[ir.Node]) -> dict[ir.Node, ir.DataType]:
        """Node -> the type of its float values, by the rules of the class."""
        types: dict[ir.Node, ir.DataType] = {}

        def of(value: ir.Value) -> ir.DataType:
            maker = value.producer()
            if maker is not None:
                return types.get(maker, self.dtype)
            if value.name in self.float32_weights:
                return ir.DataType.FLOAT
            return self._port(value) if value in model.graph.inputs else self.dtype

        for node in nodes:
            followed = moved_inputs(node)
            if node.op_type == "TensorScatter":
                followed = followed[:1]
            if node.op_type == "Attention":  # its keys
                followed = [value for value in node.inputs[1:2] if value is not None]
                if not _is_cache(followed):
                    followed = []
            stays = node in self.float32_nodes
            follows = bool(followed) and all(of(v) == ir.DataType.FLOAT for v in followed)
            types[node] = ir.DataType.FLOAT if stays or follows else self.dtype
        return types

    def _convert_weight(self, plan: _Plan, weight: ir.Value) -> None:
        assert weight.const_value is not None
        assert weight.name is not None
        if weight.name in self.float32_weights:
            return
        readers = {plan.types[use.node] for use in weight.uses() if use.node in plan.types}
        if is_parameter(weight) or readers == {self.dtype}:
            weight.const_value = narrowed(weight.const_value, self.dtype)
            weight.type = ir.TensorType(self.dtype)
        elif self.dtype in readers:
            plan.add_half_copy(weight)


def _is_cache(values: list[ir.Value]) -> bool:
    makers = [value.producer() for value in values]
    return any(maker is not None and maker.op_type == "TensorScatter" for maker in makers)


@dataclass(slots=True)
class _Plan:
    """The casts that have been placed so far.

    Attributes:
        model: the graph's model.
        half: the half-precision type.
        types: node -> the type of its float values.
        copies: a value's name and a type -> the value of that type.
    """

    model: ir.Model
    half: ir.DataType
    types: dict[ir.Node, ir.DataType]
    copies: dict[tuple[str, ir.DataType], ir.Value] = field(default_factory=dict)

    def add_half_copy(self, constant: ir.Value) -> None:
        """Stores a constant a second time, in half precision."""
        assert constant.const_value is not None
        name = f"{constant.name}.{self.half.name.lower()}"
        tensor = narrowed(constant.const_value, self.half)
        copy = ir.Value(name=name, shape=constant.shape, type=ir.TensorType(self.half))
        copy.const_value = tensor
        self.model.graph.initializers.add(copy)
        self.copies[str(constant.name), self.half] = copy

    def read_as(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
        """Lets a node read a value in a type."""
        if value.dtype == dtype:
            return
        wanted = self._copy(value, dtype)
        for index, read in enumerate(node.inputs):
            if read is value:
                node.replace_input_with(index, wanted)

    def hand_out(self, value: ir.Value, dtype: ir.DataType) -> None:
        """Lets a value leave the graph in a type, under its own name."""
        if value.dtype == dtype:
            return
        name = str(value.name)
        outputs = self.model.graph.outputs
        value.name = f"{name}.{value.dtype.name.lower() if value.dtype else ''}"
        leaving = self._copy(value, dtype)
        leaving.name = name
        outputs[outputs.index(value)] = leaving

    def _copy(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = (str(value.name), dtype)
        if key not in self.copies:
            self.copies[key] = self._cast(value, dtype)
        return self.copies[key]

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": int(dtype)})
        result = cast.outputs[0]
        result.name = f"{value.name}.{dtype.name.lower()}"
        result.type, result.shape = ir.TensorType(dtype), value.shape
        cast.name = f"{result.name}.cast"
        maker = value.producer()
        if maker is None:
            self.model.graph.insert_before(self.model.graph[0], cast)
        else:
            self.model.graph.insert_after(maker, cast)
        return result
