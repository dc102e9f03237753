"""Lets a product read its weight as integers and a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from vlmport.errors import GraphError
from vlmport.export.recipe import RECIPE_KEY

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["dequantize_weight_"]


def dequantize_weight_(
    model: ir.Model,
    node: ir.Node,
    values: NDArray[np.int8],
    scale: NDArray[Any],
    dtype: ir.DataType,
) -> None:
    """Replaces the float weight of a MatMul or Gemm by a quantized one.

        x -> MatMul(w)               =>  x -> MatMul(DequantizeLinear(w.int4, w.scale))
        x -> Gemm(w', b, transB=1)   =>  x -> MatMul(DequantizeLinear(w.int4, w.scale)) -> Add(b)

    The weight of a Gemm is stored transposed: ONNX Runtime fuses the dequantization into MatMul
    (MatMulNBits) and leaves that of a Gemm or behind a Transpose as it is (INT4, 1.31.1). The
    output keeps its name.

    Args:
        model: the graph's model; its last reader gone, the float weight is dropped.
        node: MatMul with a weight [in_channels, out_channels], or Gemm.
        values: int8 [in_channels, out_channels]; within -8..7 for INT4.
        scale: [blocks, out_channels], of the graph's element type; one block for INT8 becomes a
            scale for each output channel, which is the form that TensorRT documents.
        dtype: INT8 or INT4.

    Raises:
        GraphError: if a Gemm scales its product or transposes x, or MatMul's weight is not the
            second input.
    """
    _check(node)
    weight = node.inputs[1]
    assert weight is not None
    assert weight.name is not None
    quantized, steps = _initializers(model, node, values, scale, dtype)
    per_channel = len(scale) == 1 and dtype == ir.DataType.INT8
    attributes = (
        {"axis": 1} if per_channel else {"axis": 0, "block_size": len(values) // len(scale)}
    )
    dequantized = ir.node("DequantizeLinear", [quantized, steps], attributes)
    _describe(dequantized.outputs[0], f"{weight.name}.dequantized", weight.dtype, values.shape)
    if node.op_type == "MatMul":
        model.graph.insert_before(node, dequantized)
        node.replace_input_with(1, dequantized.outputs[0])
    else:
        _replace_gemm(model, node, dequantized)
    if not weight.uses():
        del model.graph.initializers[weight.name]


def _check(node: ir.Node) -> None:
    is_plain = node.op_type == "MatMul" or (
        node.op_type == "Gemm"
        and node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_float("beta", 1.0) == 1.0
        and node.attributes.get_int("transA", 0) == 0
    )
    weight = node.inputs[1] if is_plain and len(node.inputs) > 1 else None
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        msg = (
            f"{node.op_type} {node.name!r}: cannot read a quantized weight; expected a MatMul, or "
            "a Gemm with alpha = beta = 1 and transA = 0, whose second input is a weight of two "
            "axes; leave the layer float"
        )
        raise GraphError(msg)


def _initializers(
    model: ir.Model,
    node: ir.Node,
    values: NDArray[np.int8],
    scale: NDArray[Any],
    dtype: ir.DataType,
) -> tuple[ir.Value, ir.Value]:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    blocks = len(scale)
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    name = f"{weight.name}.{dtype.name.lower()}"
    form = (
        dtype.name.lower() if dtype == ir.DataType.INT8 else f"int4 block {len(values) // blocks}"
    )
    origin = weight.const_value.metadata_props.get(RECIPE_KEY, str(weight.name))
    recipe = " | ".join([origin, *(["transpose"] if turned else []), form])
    tensor: ir.TensorProtocol
    if dtype == ir.DataType.INT4:
        tensor = ir.PackedTensor(
            _packed(values),
            dtype,
            shape=ir.Shape(values.shape),
            name=name,
            metadata_props={RECIPE_KEY: recipe},
        )
    else:
        tensor = ir.tensor(np.ascontiguousarray(values), name=name)
        tensor.metadata_props[RECIPE_KEY] = recipe
    steps = scale[0] if blocks == 1 and dtype == ir.DataType.INT8 else scale
    scale_name = f"{weight.name}.scale"
    made = (_value(tensor), _value(ir.tensor(np.ascontiguousarray(steps), name=scale_name)))
    for value in made:
        model.graph.initializers.add(value)
    return made


def _packed(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two of INT4 a byte, the first in the low half, as TensorProto.raw_data has them."""
    flat = values.reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.int8(0))
    halves = flat.view(np.uint8) & 0x0F
    return np.asarray(halves[0::2] | (halves[1::2] << 4), np.uint8)


def _value(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name,
        shape=ir.Shape(tuple(tensor.shape.numpy())),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


def _replace_gemm(model: ir.Model, node: ir.Node, dequantized: ir.Node) -> None:
    output = node.outputs[0]
    product = ir.node("MatMul", [node.inputs[0], dequantized.outputs[0]], name=node.name)
    made = [dequantized, product]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        made.append(ir.node("Add", [product.outputs[0], bias]))
        _describe(product.outputs[0], f"{output.name}.product", output.dtype, output.shape)
    _describe(made[-1].outputs[0], str(output.name), output.dtype, output.shape)
    made[-1].metadata_props.update(node.metadata_props)
    model.graph.insert_before(node, made)
    output.replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _describe(
    value: ir.Value, name: str, dtype: ir.DataType | None, shape: ir.Shape | tuple[int, ...] | None
) -> None:
    value.name = name
    value.type = None if dtype is None else ir.TensorType(dtype)
    value.shape = ir.Shape(shape) if isinstance(shape, tuple) else shape
