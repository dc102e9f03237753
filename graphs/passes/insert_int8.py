"""Lets a product multiply integers: its activation and its weight pass through INT8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.errors import GraphError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Int8Product", "insert_int8_"]


@dataclass(frozen=True, slots=True, eq=False)
class Int8Product:
    """How one product is quantized.

    Attributes:
        name: prefix of the names that are made; unique in the graph.
        node: a MatMul, Gemm or Conv whose second input is a weight of the file.
        activation_scale: of the graph's element type, one number > 0: the activation's step.
        weight: int8, of the float weight's shape; its name is the initializer's.
        weight_scale: of the graph's element type [out_channels].
        output_axis: axis of the weight that is the output's channels.
    """

    name: str
    node: ir.Node
    activation_scale: NDArray[np.floating]
    weight: ir.TensorProtocol
    weight_scale: NDArray[np.floating]
    output_axis: int


def insert_int8_(model: ir.Model, product: Int8Product) -> None:
    """Rewrites a product in place.

        x, w    -> MatMul / Conv                -> y
     => x       -> QuantizeLinear -> DequantizeLinear -\
        w.int8  -> DequantizeLinear(per output channel) -> MatMul / Conv -> y
        x, w, b -> Gemm -> y   =>   the same with Gemm(x, w) -> Add(b) -> y

    Input and output keep their names; the float weight leaves the graph. Zero points are written
    out, all 0: without them ONNX Runtime 1.31 fuses nothing, and it fuses a Gemm only if its float
    bias is added behind. A Conv keeps its float bias, which is what TensorRT fuses; ONNX Runtime
    has a fused kernel only for one whose output is INT8 as well, and computes this one in float.

    Raises:
        GraphError: if a Gemm scales its product or transposes its activation.
    """
    node, graph = product.node, model.graph
    _check(product)
    activation, weight = node.inputs[0], node.inputs[1]
    assert activation is not None
    assert weight is not None
    prefix = product.name
    step = _initializer(model, f"{prefix}.input_scale", product.activation_scale)
    zero = _initializer(model, f"{prefix}.input_zero_point", np.zeros((), np.int8))
    steps = _initializer(model, f"{weight.name}.scale", product.weight_scale)
    zeros = np.zeros(product.weight_scale.shape, np.int8)
    zero_points = _initializer(model, f"{weight.name}.zero_point", zeros)
    integers = _add(model, product.weight)
    quantize = ir.node("QuantizeLinear", [activation, step, zero])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], step, zero])
    expand = ir.node(
        "DequantizeLinear", [integers, steps, zero_points], {"axis": product.output_axis}
    )
    for made, name, like, dtype in (
        (quantize, f"{prefix}.input_int8", activation, ir.DataType.INT8),
        (dequantize, f"{prefix}.input_dequantized", activation, activation.dtype),
        (expand, f"{weight.name}.dequantized", weight, weight.dtype),
    ):
        _describe(made.outputs[0], name, like, dtype)
        made.metadata_props.update(node.metadata_props)
    graph.insert_before(node, [quantize, dequantize, expand])
    node.replace_input_with(0, dequantize.outputs[0])
    node.replace_input_with(1, expand.outputs[0])
    if not weight.uses():
        del graph.initializers[str(weight.name)]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        _move_bias_behind(model, node, f"{prefix}.product")


def _check(product: Int8Product) -> None:
    node = product.node
    if node.op_type != "Gemm":
        return
    plain = (
        node.attributes.get_int("transA", 0) == 0
        and node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_float("beta", 1.0) == 1.0
    )
    if not plain:
        msg = (
            f"{product.name}: found a Gemm with transA, alpha or beta; expected x @ w + b; leave "
            "the layer float"
        )
        raise GraphError(msg)


def _move_bias_behind(model: ir.Model, node: ir.Node, name: str) -> None:
    output, bias = node.outputs[0], node.inputs[2]
    assert bias is not None
    node.resize_inputs(2)
    add = ir.node("Add", [output, bias])
    add.metadata_props.update(node.metadata_props)
    model.graph.insert_after(node, add)
    total = add.outputs[0]
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    whole = str(output.name)
    output.name = name
    _describe(total, whole, output, output.dtype)


def _describe(value: ir.Value, name: str, like: ir.Value, dtype: ir.DataType | None) -> None:
    value.name = name
    value.shape = like.shape
    value.type = None if dtype is None else ir.TensorType(dtype)


def _initializer(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    return _add(model, ir.tensor(array, name=name))


def _add(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.initializers.add(value)
    return value
