"""Finds the layers of a graph that can be quantized and names them as PyTorch does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmport.export.recipe import RECIPE_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

__all__ = ["Layer", "LayerOperator", "find_layers", "module_names"]

LayerOperator = Literal["MatMul", "Gemm", "Conv"]
_WEIGHT_RANKS = {"MatMul": (2,), "Gemm": (2,), "Conv": (3, 4)}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A node that multiplies an activation by a weight of the file.

    Attributes:
        name: short and unique in its graph: the modules' common path, then their last names
            joined by "+" ("model.layers.0.self_attn.q_proj+k_proj+v_proj").
        modules: PyTorch modules whose weights the node reads, in the order of its output channels.
        operator: type of the node.
        node: the node itself; valid until a pass replaces it.
        activation: the value that the node reads, float [.., in_channels] (Conv: [batch,
            in_channels, height, width]).
        weight: the weight; MatMul [in_channels, out_channels], Gemm with transB [out_channels,
            in_channels], Conv [out_channels, in_channels, height, width].
        input_axis: axis of the weight that is summed over; 1 for Conv, whose other axes behind it
            are summed over as well.
        output_axis: axis of the weight that is the output's channels.
    """

    name: str
    modules: tuple[str, ...]
    operator: LayerOperator
    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    input_axis: int
    output_axis: int

    @property
    def out_channels(self) -> int:
        """Output channels of all modules together."""
        assert self.weight.shape is not None
        return int(self.weight.shape.numpy()[self.output_axis])

    @property
    def makes_logits(self) -> bool:
        """Whether the output is the graph's output "logits", but for a bias, a cap or a cast."""
        value: ir.Value | None = self.node.outputs[0]
        while value is not None and not value.is_graph_output():
            readers = [use.node for use in value.uses()]
            value = readers[0].outputs[0] if len(readers) == 1 else None
        return value is not None and value.name == "logits"

    @property
    def in_channels(self) -> int:
        """Length of the axis that is summed over (Conv: without the kernel's extent)."""
        assert self.weight.shape is not None
        return int(self.weight.shape.numpy()[self.input_axis])


def find_layers(model: ir.Model) -> tuple[Layer, ...]:
    """The quantizable layers of a graph, in the order of its nodes.

    A node counts if it is a MatMul, Gemm or Conv whose second input is a float weight of the file,
    read by nobody else; a weight that is quantized already does not.
    """
    found: list[Layer] = []
    taken: set[str] = set()
    for node in model.graph:
        layer = _layer(node, taken)
        if layer is not None:
            found.append(layer)
            taken.add(layer.name)
    return tuple(found)


def module_names(value: ir.Value) -> tuple[str, ...]:
    """The PyTorch modules whose parameters a weight is made of; its own name if none is recorded.

    Source: the recipe that `vlmport.export.stream` records beside each tensor.
    """
    assert value.const_value is not None
    assert value.name is not None
    recipe = value.const_value.metadata_props.get(RECIPE_KEY, value.name)
    parameters = recipe.split(" | ")[0].split(" + ")
    return tuple(name.rpartition(".")[0] or name for name in parameters)


def _layer(node: ir.Node, taken: set[str]) -> Layer | None:
    if node.op_type not in _WEIGHT_RANKS or node.domain or len(node.inputs) < 2:
        return None
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None or not weight.is_initializer():
        return None
    if weight.const_value is None or activation.is_initializer() or len(weight.uses()) != 1:
        return None
    if not weight.const_value.dtype.is_floating_point():
        return None
    if len(weight.const_value.shape) not in _WEIGHT_RANKS[node.op_type]:
        return None
    if node.op_type == "Conv" and node.attributes.get_int("group", 1) != 1:
        return None
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1:
        return None
    input_axis = 1 if node.op_type == "Conv" or transposed else 0
    modules = module_names(weight)
    return Layer(
        name=_unique(_joined(modules), taken),
        modules=modules,
        operator=node.op_type,  # type: ignore[arg-type]  # one of the keys of _WEIGHT_RANKS
        node=node,
        activation=activation,
        weight=weight,
        input_axis=input_axis,
        output_axis=1 - input_axis,
    )


def _joined(modules: Sequence[str]) -> str:
    if len(modules) == 1:
        return modules[0]
    common = os.path.commonpath([name.replace(".", "/") for name in modules]).replace("/", ".")
    tails = [name[len(common) + 1 :] if common else name for name in modules]
    return ".".join(part for part in (common, "+".join(tails)) if part)


def _unique(name: str, taken: set[str]) -> str:
    count, unique = 1, name
    while unique in taken:
        count += 1
        unique = f"{name}#{count}"
    return unique
