"""Weight-only INT8 and INT4: layers of a graph get integer weights, one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from vlmport.calibration.gptq import compensated, error_feedback, output_error
from vlmport.calibration.rounding import (
    INT4,
    INT8,
    IntegerRange,
    QuantizedWeight,
    dequantize,
    round_to_nearest,
)
from vlmport.errors import CalibrationError
from vlmport.graphs.passes.dequantize_weight import dequantize_weight_

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import DTypeLike, NDArray

    from vlmport.calibration.layers import Layer
    from vlmport.calibration.recipe import LayerFormat, WeightMethod
    from vlmport.calibration.statistics import GraphStatistics
    from vlmport.export.stream import ByteProgress

__all__ = ["QuantizedLayer", "block_size_for", "quantize_weights_"]

Rounding = Literal["nearest", "gptq"]
# Output channels that are worked on at once: 4096 x 16384 input channels are 256 MiB of float32.
_COLUMNS = 4096


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What became of a layer that was asked to be "int8-weight-only" or "int4".

    Attributes:
        layer: its name.
        format: what it is now.
        rounding: how its weight was rounded; "" if it stayed float.
        block_size: input channels that share a scale; None for a scale per output channel.
        float_bytes: bytes of the float weight.
        bytes: bytes of what replaced it, scales included.
        weight_snr_db: energy of the weights over that of their rounding errors, dB.
        nearest_error: norm of the output's error over that of the output on the calibration data
            if each weight is rounded for itself; None without a second moment.
        output_error: the same as the layer is now.
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

    Args:
        model: the graph's model; its weights may lie in a file.
        layers: those of `find_layers`.
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
    results: list[QuantizedLayer] = []
    for layer in layers:
        if formats[layer.name] in ("int8-weight-only", "int4"):
            results.append(_quantize(model, layer, formats[layer.name], method, statistics))
            progress(results[-1].float_bytes)
    return tuple(results)


@dataclass(frozen=True, slots=True)
class _Form:
    limits: IntegerRange
    dtype: ir.DataType
    block_size: int  # in_channels for a scale per output channel
    rounding: Rounding


def _quantize(
    model: ir.Model,
    layer: Layer,
    asked: LayerFormat,
    method: WeightMethod,
    statistics: GraphStatistics,
) -> QuantizedLayer:
    tensor = layer.weight.const_value
    assert tensor is not None
    result = QuantizedLayer(layer.name, asked, "", None, tensor.nbytes, tensor.nbytes)
    if layer.operator == "Conv":
        note = "a convolution with an integer weight has no fused kernel; it stays float"
        return replace(result, format="float", note=note)
    block_size = block_size_for(layer.in_channels, method.block_size) if asked == "int4" else None
    if block_size is not None:
        rounding: Rounding = "gptq" if "gptq" in method.rounding else "nearest"
        form = _Form(INT4, ir.DataType.INT4, block_size, rounding)
    else:
        form = _Form(INT8, ir.DataType.INT8, layer.in_channels, method.int8_rounding)
    second_moment = _second_moment(layer, form, statistics)
    quantized, errors = _round(layer, form, second_moment)
    dequantize_weight_(model, layer.node, quantized.values, quantized.scale, form.dtype)
    return replace(
        result,
        format="int4" if block_size is not None else "int8-weight-only",
        rounding=form.rounding,
        block_size=block_size,
        bytes=-(-quantized.values.size * form.dtype.bitwidth // 8) + quantized.scale.nbytes,
        weight_snr_db=errors.weight_snr_db,
        nearest_error=errors.nearest_error,
        output_error=errors.output_error,
        note=_note(layer, asked, method.block_size, block_size),
    )


def _note(layer: Layer, asked: LayerFormat, asked_size: int, block_size: int | None) -> str:
    if asked != "int4" or block_size == asked_size:
        return ""
    if block_size is None:
        return f"{layer.in_channels} input channels are no multiple of 32; INT8 instead"
    return f"{layer.in_channels} input channels are no multiple of {asked_size}; {block_size} is"


def _second_moment(
    layer: Layer, form: _Form, statistics: GraphStatistics
) -> NDArray[np.float32] | None:
    seen = statistics.get(str(layer.activation.name))
    moment = None if seen is None else seen.second_moment
    if moment is None and form.rounding != "nearest":
        msg = (
            f"{layer.name}: no second moment of its input was collected; expected one for "
            f"{form.rounding!r}; collect statistics for this recipe, or round to nearest"
        )
        raise CalibrationError(msg)
    if moment is not None and not np.isfinite(np.diagonal(moment)).all():
        msg = (
            f"{layer.name}: the second moment of its input holds NaN or infinity; expected finite "
            "activations; look for the first module that gives them, or leave the layer float"
        )
        raise CalibrationError(msg)
    return moment if moment is not None and moment.any() else None  # all inputs were 0


@dataclass(slots=True)
class _Errors:
    """Sums over output channels."""

    weight: float = 0.0
    weight_noise: float = 0.0
    output: float = 0.0
    nearest_noise: float = 0.0
    output_noise: float = 0.0
    has_output: bool = False

    @property
    def weight_snr_db(self) -> float:
        if self.weight_noise == 0:
            return float("inf")
        return 10 * float(np.log10(max(self.weight, 1e-300) / self.weight_noise))

    @property
    def nearest_error(self) -> float | None:
        return _relative(self.nearest_noise, self.output) if self.has_output else None

    @property
    def output_error(self) -> float | None:
        return _relative(self.output_noise, self.output) if self.has_output else None


def _relative(noise: float, signal: float) -> float:
    return float(np.sqrt(max(noise, 0) / signal)) if signal > 0 else 0.0


def _round(
    layer: Layer, form: _Form, second_moment: NDArray[np.float32] | None
) -> tuple[QuantizedWeight, _Errors]:
    assert layer.weight.const_value is not None
    source = layer.weight.const_value.numpy()
    values = np.empty((layer.in_channels, layer.out_channels), np.int8)
    scale = np.empty((layer.in_channels // form.block_size, layer.out_channels), source.dtype)
    errors = _Errors(has_output=second_moment is not None)
    rounder = _Rounder(form, source.dtype, second_moment)
    for first in range(0, layer.out_channels, _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        part = source[:, columns] if layer.output_axis == 1 else source[columns].T
        weight = np.ascontiguousarray(part, np.float32)
        if not np.isfinite(weight).all():
            msg = (
                f"{layer.name}: its weight holds NaN or infinity; expected finite numbers; "
                "repair the checkpoint"
            )
            raise CalibrationError(msg)
        rounded = rounder.round(weight, errors)
        values[:, columns], scale[:, columns] = rounded.values, rounded.scale
    return QuantizedWeight(values, scale), errors


class _Rounder:
    """Rounds some output channels of a layer and counts the errors."""

    def __init__(
        self, form: _Form, dtype: DTypeLike, second_moment: NDArray[np.float32] | None
    ) -> None:
        self._form, self._dtype, self._moment = form, dtype, second_moment
        self._feedback = None
        if form.rounding == "gptq" and second_moment is not None:
            self._feedback = error_feedback(second_moment)

    def round(self, weight: NDArray[np.float32], errors: _Errors) -> QuantizedWeight:
        form = self._form
        best = round_to_nearest(weight, form.block_size, form.limits, self._dtype)
        if self._moment is not None:
            noise = output_error(weight, dequantize(best), self._moment)
            errors.nearest_noise += float(noise.sum())
            if self._feedback is not None:
                other = compensated(
                    weight, self._feedback, form.block_size, form.limits, self._dtype
                )
                best, noise = self._better(weight, best, noise, other)
            errors.output_noise += float(noise.sum())
            errors.output += float(output_error(weight, np.zeros_like(weight), self._moment).sum())
        errors.weight += float(np.square(weight, dtype=np.float64).sum())
        errors.weight_noise += float(np.square(weight - dequantize(best), dtype=np.float64).sum())
        return best

    def _better(
        self,
        weight: NDArray[np.float32],
        nearest: QuantizedWeight,
        noise: NDArray[np.float64],
        other: QuantizedWeight,
    ) -> tuple[QuantizedWeight, NDArray[np.float64]]:
        """For each output channel the one with the smaller error of the output."""
        assert self._moment is not None
        other_noise = output_error(weight, dequantize(other), self._moment)
        wins = other_noise < noise
        chosen: list[NDArray[Any]] = [
            np.where(wins, ours, plain)
            for ours, plain in ((other.values, nearest.values), (other.scale, nearest.scale))
        ]
        return QuantizedWeight(chosen[0], chosen[1]), np.where(wins, other_noise, noise)
