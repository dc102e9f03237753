"""W8A8: layers that multiply INT8 activations by INT8 weights, both symmetric.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.1, with zero points 0 as TensorRT requires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.calibration.observers import threshold
from vlmport.errors import CalibrationError
from vlmport.export.recipe import RECIPE_KEY
from vlmport.graphs.passes.insert_int8 import Int8Product, insert_int8_

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.calibration.layers import Layer
    from vlmport.calibration.recipe import ActivationMethod, LayerFormat
    from vlmport.calibration.statistics import GraphStatistics, ValueStatistics
    from vlmport.export.stream import ByteProgress

__all__ = ["ActivationRange", "quantize_activations_"]

_LARGEST_CODE = 127  # -128 is not used: both signs have one range


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """How the activation of a layer was quantized.

    Attributes:
        layer: the layer's name.
        threshold: the largest magnitude that is represented; larger ones are clipped to it.
        amax: the largest magnitude that was seen.
        scale: the activation's step.
    """

    layer: str
    threshold: float
    amax: float
    scale: float


def quantize_activations_(
    model: ir.Model,
    layers: Sequence[Layer],
    formats: Mapping[str, LayerFormat],
    method: ActivationMethod,
    statistics: GraphStatistics,
    progress: ByteProgress,
) -> tuple[ActivationRange, ...]:
    """Quantizes the layers of format "int8" in place.

    The integers of a weight are computed from the float weight when they are asked for, so that no
    more than one is held.

    Args:
        model: the graph's model; its weights may lie in a file.
        layers: those of `find_layers`.
        formats: layer name -> format; layers of other formats stay as they are.
        method: the observer; `smoothing` has been done before (`vlmport.calibration.smooth`).
        statistics: of the layers' activations, as the graph computes them now.
        progress: is told of every layer's float bytes.

    Returns:
        The range of each layer of the format, in the order of `layers`.

    Raises:
        CalibrationError: if an activation has no statistics or was not finite, or a weight is not.
        GraphError: if a layer's node is of a form that cannot be quantized.
    """
    chosen = [layer for layer in layers if formats[layer.name] == "int8"]
    # All are checked before anything changes.
    ranges = [_range(layer, method, statistics) for layer in chosen]
    pairs: dict[ir.Value, int] = {}
    for layer, found in zip(chosen, ranges, strict=True):
        tensor = layer.weight.const_value
        assert tensor is not None
        step = np.asarray(found.scale, tensor.dtype.numpy())
        # Equal Q/DQ pairs would be merged into one by ONNX Runtime, whose kernels then do not fuse
        # (1.31: 420 ms a token in place of 18); a unit in the last place keeps them apart.
        for _ in range(pairs.setdefault(layer.activation, 0)):
            step = np.nextafter(step, np.asarray(np.inf, step.dtype))
        pairs[layer.activation] += 1
        insert_int8_(model, _product(layer, step))
        progress(tensor.nbytes)
    return tuple(ranges)


def _range(layer: Layer, method: ActivationMethod, statistics: GraphStatistics) -> ActivationRange:
    name = str(layer.activation.name)
    if name not in statistics:
        msg = (
            f"{layer.name}: no statistics of its activation {name!r}; INT8 activations need the "
            "ranges that calibration data shows; collect them"
        )
        raise CalibrationError(msg)
    seen: ValueStatistics = statistics[name]
    try:
        limit = threshold(method, seen)
    except CalibrationError as error:
        msg = f"{layer.name}: activation {name!r}: {error}"
        raise CalibrationError(msg) from error
    # An activation that is always 0 is represented by any step.
    return ActivationRange(layer.name, limit, seen.amax, limit / _LARGEST_CODE or 1.0)


def _product(layer: Layer, step: NDArray[np.floating]) -> Int8Product:
    source = layer.weight.const_value
    assert source is not None
    axis = layer.output_axis
    scale = _weight_scale(layer, source)
    name = f"{layer.weight.name}.int8"
    recipe = source.metadata_props.get(RECIPE_KEY, str(layer.weight.name))
    lengths = [1] * len(source.shape)
    lengths[axis] = -1

    def integers() -> ir.TensorProtocol:
        steps = scale.astype(np.float32).reshape(lengths)
        codes = np.rint(source.numpy().astype(np.float32) / steps)
        clipped = np.clip(codes, -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8)
        return ir.tensor(clipped, name=name)

    weight = ir.LazyTensor(
        integers,
        dtype=ir.DataType.INT8,
        shape=ir.Shape(source.shape.numpy()),
        name=name,
        metadata_props={RECIPE_KEY: f"{recipe} | int8"},
    )
    return Int8Product(layer.name, layer.node, step, weight, scale, axis)


def _weight_scale(layer: Layer, source: ir.TensorProtocol) -> NDArray[np.floating]:
    """[out_channels], of the weight's type: the largest magnitude of a channel becomes 127."""
    weight = source.numpy()
    others = tuple(axis for axis in range(weight.ndim) if axis != layer.output_axis)
    amax = np.abs(weight).max(axis=others).astype(np.float32)
    if not np.isfinite(amax).all():
        msg = (
            f"{layer.name}: {int((~np.isfinite(amax)).sum())} output channels have weights that "
            "are no finite numbers; export the checkpoint again, or check it"
        )
        raise CalibrationError(msg)
    steps = (amax / np.float32(_LARGEST_CODE)).astype(weight.dtype)
    # Also a channel whose step would round to 0.
    return np.where(steps > 0, steps, np.ones((), weight.dtype))
