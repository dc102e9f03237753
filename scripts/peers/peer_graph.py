"""Prepares a graph for a peer, and makes a bundle of what the peers wrote."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from vlmport.api.progress import SilentProgress
from vlmport.api.quantized_bundle import write_bundle
from vlmport.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["decoder_bytes", "write_peer_bundle", "write_plain_graph"]

_LARGEST_INLINE_BYTES = 256  # of graphs/saving.py: smaller ones are constants of shapes and axes


def write_plain_graph(source: Path, target: Path, *, gemm_as_matmul: bool) -> None:
    """Copies a graph with its weights in the same file and a name for every node.

    Args:
        source: a graph of the float bundle.
        target: the file to write.
        gemm_as_matmul: whether Gemm(transB=1) becomes MatMul by the transposed weight, and Add.
            Exact, and needed where a peer quantizes MatMul alone: it would otherwise leave the
            largest matrix, the output head, in float.
    """
    model = onnx.load(source)
    nodes = []
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
        is_gemm = gemm_as_matmul and node.op_type == "Gemm"
        nodes += _as_matmul(node, model) if is_gemm else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, target)


def _as_matmul(node: onnx.NodeProto, model: onnx.ModelProto) -> list[onnx.NodeProto]:
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    if {"alpha": 1.0, **attributes} != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}:
        raise ValueError(f"{node.name}: found {attributes}; expected x times a transposed weight")
    activation, name, *bias = node.input
    weight = next(each for each in model.graph.initializer if each.name == name)
    turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
    weight.CopyFrom(numpy_helper.from_array(turned, name))
    for index, value in enumerate(model.graph.value_info):
        if value.name == name:  # its shape is that of the weight as it was
            del model.graph.value_info[index]
            break
    product = f"{node.name}_product" if bias else node.output[0]
    nodes = [onnx.helper.make_node("MatMul", [activation, name], [product], node.name)]
    if bias:
        added = onnx.helper.make_node("Add", [product, *bias], node.output, f"{node.name}_bias")
        nodes.append(added)
    return nodes


def write_peer_bundle(base: Path, graphs: Mapping[str, Path], folder: Path) -> None:
    """Writes a bundle with a peer's graphs in place of the float ones.

    Args:
        base: the float bundle.
        graphs: graph name -> file that the peer wrote.
        folder: replaced if it is there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models = {name: ir.load(path) for name, path in graphs.items()}
    write_bundle(folder, base, load_manifest(base), models, SilentProgress())


def decoder_bytes(bundle: Path) -> int:
    """Bytes of the decoder's weights, whether they are initializers or constants' values."""
    model = ir.load(bundle / load_manifest(bundle).graph("decoder").file)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    constants = [node for node in model.graph if node.op_type == "Constant"]
    tensors += [
        node.attributes["value"].as_tensor() for node in constants if "value" in node.attributes
    ]
    sizes = (tensor.nbytes for tensor in tensors if tensor is not None)
    return sum(size for size in sizes if size > _LARGEST_INLINE_BYTES)
