"""Weight-only INT8 and INT4: layers of a graph get integer weights, one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.calibration.awq import scaled_moment, search_scale
from vlmport.calibration.layer_rounding import Rounder, WeightForm, round_layer, some_channels
from vlmport.calibration.migration import find_migrations, migrate_
from vlmport.calibration.rounding import INT4, INT8
from vlmport.errors import CalibrationError
from vlmport.graphs.passes.dequantize_weight import dequantize_weight_

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.calibration.awq import SearchedScale
    from vlmport.calibration.layers import Layer
    from vlmport.calibration.migration import Migration
    from vlmport.calibration.recipe import LayerFormat, WeightMethod
    from vlmport.calibration.rounding import QuantizedWeight
    from vlmport.calibration.statistics import GraphStatistics
    from vlmport.export.stream import ByteProgress

__all__ = ["QuantizedLayer", "block_size_for", "quantize_weights_"]

# Output channels of a layer on which scales are searched; all behave alike, and a search over all
# would cost ten times the rounding itself.
_SEARCH_CHANNELS = 192


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What became of a layer that was asked to be "int8-weight-only" or "int4".

    Attributes:
        layer: its name.
        format: what it is now.
        rounding: how its weight was rounded: "nearest", "awq", "gptq" or "awq+gptq"; "" if it
            stayed float.
        block_size: input channels that share a scale; None for a scale per output channel.
        float_bytes: bytes of the float weight.
        bytes: bytes of what replaced it, scales included.
        weight_snr_db: energy of the weights over that of their rounding errors, dB; None if there
            are none.
        nearest_error: norm of the output's error over that of the output on the calibration data
            if each weight (scaled, for "awq") is rounded for itself; None without a second moment.
        output_error: the same as the layer is now.
        scale_exponent: by which "awq" scaled its input's channels; None if it could not.
        note: why the format or the block size is not what was asked; "" if it is.
    """

    layer: str
    format: LayerFormat
    rounding: str
    block_size: int | None
    float_bytes: int
    bytes: int
    weight_snr_db: float | None = None
    nearest_error: float | None = None
    output_error: float | None = None
    scale_exponent: float | None = None
    note: str = ""


def block_size_for(in_channels: int, asked: int) -> int | None:
    """The largest of 128, 64 and 32, not above `asked`, that divides in_channels.

    ONNX allows a shorter last block, TensorRT does not ("must divide into whole blocks").
    """
    return next((n for n in (128, 64, 32) if n <= asked and in_channels % n == 0), None)


def quantize_weights_(
    model: ir.Model,
    layers: Sequence[Layer],
    formats: Mapping[str, LayerFormat],
    method: WeightMethod,
    statistics: GraphStatistics,
    progress: ByteProgress,
) -> tuple[QuantizedLayer, ...]:
    """Quantizes the layers of formats "int8-weight-only" and "int4" in place.

    "awq" scales inputs of "int4" layers, so statistics of these values, and of caches that hold
    them, are no longer true afterwards.

    Args:
        model: the graph's model; its weights may lie in a file.
        layers: those of `find_layers`, all of them.
        formats: layer name -> format; layers of other formats stay as they are.
        method: how to round.
        statistics: of the layers' inputs; with second moments for "awq" and "gptq", may be empty
            for "nearest".
        progress: is told of every layer's float bytes.

    Returns:
        What became of each layer of these formats, in the order of `layers`.

    Raises:
        CalibrationError: if a weight is not finite, or the method needs a second moment that was
            not collected or is not finite.
    """
    asked = [layer for layer in layers if formats[layer.name] in ("int8-weight-only", "int4")]
    plans = {layer.name: _plan(layer, formats[layer.name], method) for layer in asked}
    moments = {layer.name: _second_moment(layer, plans[layer.name], statistics) for layer in asked}
    scales: dict[str, SearchedScale] = {}
    if "awq" in method.rounding:
        scales = _scale_inputs(model, layers, formats, plans, moments, statistics)
    results: list[QuantizedLayer] = []
    for layer in asked:
        moment, scale = moments.pop(layer.name), scales.get(layer.name)
        if moment is not None and scale is not None:
            moment = scaled_moment(moment, scale.scale)
        result = _quantize(model, layer, plans[layer.name], moment)
        if scale is not None and result.format == "int4":
            result = replace(result, scale_exponent=scale.exponent)
        results.append(result)
        progress(result.float_bytes)
    return tuple(results)


@dataclass(frozen=True, slots=True)
class _Plan:
    format: LayerFormat
    form: WeightForm | None  # None for a layer that stays float
    rounding: str
    note: str = ""


def _plan(layer: Layer, asked: LayerFormat, method: WeightMethod) -> _Plan:
    if layer.operator == "Conv":
        return _Plan("float", None, "", "a convolution with an integer weight has no fused kernel")
    size = block_size_for(layer.in_channels, method.block_size)
    if asked == "int4" and size is not None:
        form = WeightForm(
            INT4, size, "gptq" if "gptq" in method.rounding else "nearest", "awq" in method.rounding
        )
        whole = f"{layer.in_channels} input channels are no multiple of {method.block_size}"
        note = "" if size == method.block_size else f"{whole}; {size} is"
        return _Plan("int4", form, method.rounding, note)
    form = WeightForm(INT8, layer.in_channels, method.int8_rounding)
    note = f"{layer.in_channels} input channels are no multiple of 32; INT8 instead"
    return _Plan("int8-weight-only", form, form.rounding, note if asked == "int4" else "")


def _second_moment(
    layer: Layer, plan: _Plan, statistics: GraphStatistics
) -> NDArray[np.float32] | None:
    seen = statistics.get(str(layer.activation.name))
    moment = None if seen is None else seen.second_moment
    if moment is None:
        if plan.rounding not in ("nearest", ""):
            msg = (
                f"{layer.name}: no second moment of its input was collected; expected one for "
                f"{plan.rounding!r}; collect statistics for this recipe, or round to nearest"
            )
            raise CalibrationError(msg)
        return None
    if not np.isfinite(np.diagonal(moment)).all():
        msg = (
            f"{layer.name}: the second moment of its input holds NaN or infinity; expected finite "
            "activations; look for the first module that gives them, or leave the layer float"
        )
        raise CalibrationError(msg)
    return moment if moment.any() else None  # without any input other than 0 nothing matters


def _scale_inputs(
    model: ir.Model,
    layers: Sequence[Layer],
    formats: Mapping[str, LayerFormat],
    plans: Mapping[str, _Plan],
    moments: Mapping[str, NDArray[np.float32] | None],
    statistics: GraphStatistics,
) -> dict[str, SearchedScale]:
    """Scales the inputs of "int4" layers where that is exact; layer name -> its scale.

    An input that an "int8" layer reads as well is left to SmoothQuant.
    """
    scales: dict[str, SearchedScale] = {}
    for migration in find_migrations(model, layers):
        readers = [layer for layer in migration.layers if layer.name in plans]
        readers = [layer for layer in readers if plans[layer.name].format == "int4"]
        moment = moments[readers[0].name] if readers else None
        if moment is None or any(formats[layer.name] == "int8" for layer in migration.layers):
            continue
        positions = statistics[str(readers[0].activation.name)].positions
        found = _searched(readers, migration, plans, moment, positions)
        if found.exponent > 0:
            migrate_(model, migration, found.scale)
            scales.update({layer.name: found for layer in migration.layers})
    return scales


def _searched(
    readers: Sequence[Layer],
    migration: Migration,
    plans: Mapping[str, _Plan],
    moment: NDArray[np.float32],
    positions: int,
) -> SearchedScale:
    def round_(
        place: int, weight: NDArray[np.float32], scaled: NDArray[np.float32]
    ) -> QuantizedWeight:
        form = plans[readers[place].name].form
        assert form is not None
        return Rounder(form, np.float32, scaled).rounded(weight)

    weights = [some_channels(layer, _SEARCH_CHANNELS) for layer in readers]
    return search_scale(weights, moment, positions, migration.groups, round_)


def _quantize(
    model: ir.Model, layer: Layer, plan: _Plan, second_moment: NDArray[np.float32] | None
) -> QuantizedLayer:
    tensor = layer.weight.const_value
    assert tensor is not None
    result = QuantizedLayer(
        layer.name, plan.format, plan.rounding, None, tensor.nbytes, tensor.nbytes, note=plan.note
    )
    if plan.form is None:
        return result
    quantized, errors = round_layer(layer, plan.form, second_moment)
    dtype = ir.DataType.INT4 if plan.format == "int4" else ir.DataType.INT8
    dequantize_weight_(model, layer.node, quantized.values, quantized.scale, dtype)
    return replace(
        result,
        block_size=plan.form.block_size if plan.format == "int4" else None,
        bytes=-(-quantized.values.size * dtype.bitwidth // 8) + quantized.scale.nbytes,
        weight_snr_db=errors.weight_snr_db,
        nearest_error=errors.nearest_error,
        output_error=errors.output_error,
    )
