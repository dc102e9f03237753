"""A quantizer of few lines, round-to-nearest without any data, to test what judges quantizers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlmport.calibration.layers import Layer, find_layers
from vlmport.contract import Quantization, QuantizedGraph
from vlmport.manifest import file_entry, load_manifest, save_manifest

__all__ = ["HandFormat", "crush", "quantize_by_hand", "quantize_weights_"]

HandFormat = Literal["int8-weight-only", "int4"]
_BLOCK = 32


def quantize_weights_(
    model: ir.Model,
    names: Sequence[str] | None,
    form: HandFormat = "int8-weight-only",
    faults: Mapping[str, float] | None = None,
) -> int:
    """Puts integers and a DequantizeLinear in place of the weights of these layers; None for all.

    Args:
        model: a float graph.
        names: of layers.
        form: "int8-weight-only" with a scale a channel, "int4" with one for 32 weights.
        faults: layer name -> what its scales are multiplied by.
    """
    layers = [layer for layer in find_layers(model) if names is None or layer.name in names]
    for layer in layers:
        _quantize(model, layer, form, (faults or {}).get(layer.name, 1.0))
    return len(layers)


def crush(model: ir.Model, names: Sequence[str], steps: int = 3) -> None:
    """Rounds the weights of these layers to `steps` values on each side of zero."""
    for layer in find_layers(model):
        if layer.name in names:
            weight = _array(layer)
            scale = np.abs(weight).max() / steps
            layer.weight.const_value = ir.Tensor(
                (np.round(weight / scale) * scale).astype(weight.dtype), name=layer.weight.name
            )


def quantize_by_hand(
    source: Path,
    target: Path,
    form: HandFormat = "int8-weight-only",
    faults: Mapping[str, float] | None = None,
) -> Path:
    """Writes a bundle whose layers' weights are integers.

    Args:
        source: a float bundle.
        target: folder of the new one.
        form: of all layers; a Conv has int8 in any case.
        faults: layer name -> what its scales are multiplied by.
    """
    shutil.copytree(source, target)
    manifest = load_manifest(source)
    graphs = []
    for graph in manifest.graphs:
        model = ir.load(source / graph.file)
        count = quantize_weights_(model, None, form, faults)
        if count:
            ir.save(model, target / graph.file, external_data=f"{graph.file}.data")
            graphs.append(QuantizedGraph(graph.name, "float32", {form: count}))
    for name in ("recipe.json", "quantization.json"):
        (target / name).write_text("{}\n", encoding="utf-8")
    quantization = Quantization(form, tuple(graphs), "recipe.json", "quantization.json", "", 0)
    files = [path for path in sorted(target.iterdir()) if path.name != "manifest.json"]
    written = replace(
        manifest,
        quantization=quantization,
        files=tuple(file_entry(target, path) for path in files),
    )
    save_manifest(target, written)
    return target


def _array(layer: Layer) -> NDArray[np.float32]:
    assert layer.weight.const_value is not None
    return np.asarray(layer.weight.const_value.numpy(), np.float32)


def _quantize(model: ir.Model, layer: Layer, form: HandFormat, fault: float) -> None:
    weight, name = _array(layer), layer.weight.name
    blocked = form == "int4" and layer.operator != "Conv"
    attributes: dict[str, int] = {"axis": layer.input_axis if blocked else layer.output_axis}
    if blocked:
        attributes["block_size"] = _BLOCK
        starts = np.arange(0, weight.shape[layer.input_axis], _BLOCK)
        amax = np.maximum.reduceat(np.abs(weight), starts, layer.input_axis)
        scale = np.maximum(amax, 1e-12) / 7
        length = weight.shape[layer.input_axis]
        spread = np.repeat(scale, _BLOCK, layer.input_axis).take(range(length), layer.input_axis)
        nibbles: NDArray[Any] = np.clip(np.round(weight / spread), -8, 7).astype(ml_dtypes.int4)
        tensor = ir.Tensor(nibbles, dtype=ir.DataType.INT4, name=f"{name}.int4")
    else:
        others = tuple(axis for axis in range(weight.ndim) if axis != layer.output_axis)
        scale = np.maximum(np.abs(weight).max(others), 1e-12) / 127
        shape = [-1 if axis == layer.output_axis else 1 for axis in range(weight.ndim)]
        integers = np.round(weight / scale.reshape(shape)).astype(np.int8)
        tensor = ir.Tensor(integers, name=f"{name}.int8")
    inputs = [
        _initializer(model, tensor),
        _initializer(model, ir.Tensor((scale * fault).astype(np.float32), name=f"{name}.scale")),
    ]
    node = ir.node("DequantizeLinear", inputs, attributes=attributes)
    model.graph.insert_before(layer.node, node)
    layer.node.replace_input_with(1, node.outputs[0])
    del model.graph.initializers[str(name)]


def _initializer(model: ir.Model, tensor: ir.Tensor[Any]) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.initializers.add(value)
    return value
