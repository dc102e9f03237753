"""Rounds the weight of one layer, some output channels at a time, and measures what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlmport.calibration.descent import descended
from vlmport.calibration.gptq import compensated, damped, error_feedback, output_error
from vlmport.calibration.rounding import (
    IntegerRange,
    QuantizedWeight,
    dequantize,
    round_to_nearest,
)
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from vlmport.calibration.layers import Layer

__all__ = ["Rounder", "Rounding", "RoundingErrors", "WeightForm", "round_layer", "some_channels"]

Rounding = Literal["nearest", "gptq"]
# Output channels that are worked on at once: 2048 x 16384 input channels are 128 MiB of float32.
_COLUMNS = 2048


@dataclass(frozen=True, slots=True)
class WeightForm:
    """What a weight is rounded to, and how.

    Attributes:
        limits: the integers.
        block_size: input channels that share a scale; all of them for one per output channel.
        rounding: "nearest", or "gptq", whose result is improved by coordinate descent.
        weighted: whether scales are chosen for the output's error rather than the weight's, where
            a second moment is there.
    """

    limits: IntegerRange
    block_size: int
    rounding: Rounding
    weighted: bool = False


@dataclass(slots=True)
class RoundingErrors:
    """Squares, summed over output channels.

    Attributes:
        weight: of the weights.
        weight_noise: of their errors.
        output: of the outputs on the calibration data; 0 without a second moment.
        output_noise: of the outputs' errors.
        nearest_noise: the same with each weight rounded for itself.
    """

    weight: float = 0.0
    weight_noise: float = 0.0
    output: float = 0.0
    output_noise: float = 0.0
    nearest_noise: float = 0.0

    @property
    def weight_snr_db(self) -> float | None:
        """Energy of the weights over that of their errors; None if there is no error."""
        if self.weight_noise == 0:
            return None
        return 10 * float(np.log10(max(self.weight, 1e-300) / self.weight_noise))

    @property
    def nearest_error(self) -> float | None:
        """Norm of the outputs' errors, rounded to nearest, over that of the outputs."""
        return _relative(self.nearest_noise, self.output)

    @property
    def output_error(self) -> float | None:
        """Norm of the outputs' errors over that of the outputs."""
        return _relative(self.output_noise, self.output)


def round_layer(
    layer: Layer, form: WeightForm, second_moment: NDArray[np.float32] | None
) -> tuple[QuantizedWeight, RoundingErrors]:
    """Rounds a layer's weight in bounded memory; the weight itself is not changed.

    Args:
        layer: a MatMul or Gemm.
        form: what to round to.
        second_moment: float32 [in_channels, in_channels] of the layer's input, or None.

    Raises:
        CalibrationError: if the weight is not finite.
    """
    assert layer.weight.const_value is not None
    source = layer.weight.const_value.numpy()
    values = np.empty((layer.in_channels, layer.out_channels), np.int8)
    scale = np.empty((layer.in_channels // form.block_size, layer.out_channels), source.dtype)
    errors = RoundingErrors()
    rounder = Rounder(form, source.dtype, second_moment)
    for first in range(0, layer.out_channels, _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        rounded = rounder.measured(_part(layer, source, columns), errors)
        values[:, columns], scale[:, columns] = rounded.values, rounded.scale
    return QuantizedWeight(values, scale), errors


def some_channels(layer: Layer, count: int) -> NDArray[np.float32]:
    """Evenly spaced output channels of a layer's weight.

    Returns:
        float32 [in_channels, at most 2 * count]; a new array.
    """
    assert layer.weight.const_value is not None
    step = max(1, layer.out_channels // count)
    return _part(layer, layer.weight.const_value.numpy(), slice(None, None, step))


def _part(layer: Layer, source: NDArray[Any], columns: slice) -> NDArray[np.float32]:
    part = source[:, columns] if layer.output_axis == 1 else source[columns].T
    weight = np.array(part, np.float32, order="C")
    if not np.isfinite(weight).all():
        msg = (
            f"{layer.name}: its weight holds NaN or infinity; expected finite numbers; repair the "
            "checkpoint"
        )
        raise CalibrationError(msg)
    return weight


class Rounder:
    """Rounds output channels of weights that read the same input."""

    def __init__(
        self, form: WeightForm, dtype: DTypeLike, second_moment: NDArray[np.float32] | None
    ) -> None:
        self._form, self._dtype, self._moment = form, dtype, second_moment
        self._feedback = None
        self._importance = None
        if form.rounding == "gptq" and second_moment is not None:
            self._damped = damped(second_moment)
            self._feedback = error_feedback(self._damped)
        elif form.weighted and second_moment is not None:
            self._importance = np.ascontiguousarray(np.diagonal(second_moment))

    def rounded(self, weight: NDArray[np.float32]) -> QuantizedWeight:
        """Rounds float32 [in_channels, any] as the form says."""
        form = self._form
        if self._feedback is None:
            return round_to_nearest(
                weight, form.block_size, form.limits, self._dtype, self._importance
            )
        start = compensated(weight, self._feedback, form.block_size, form.limits, self._dtype)
        return descended(weight, start, self._damped, form.limits)

    def measured(self, weight: NDArray[np.float32], errors: RoundingErrors) -> QuantizedWeight:
        """The same, adds up the errors, and takes nearest integers for channels that win by it."""
        form, moment = self._form, self._moment
        best = self.rounded(weight)
        if moment is not None:
            nearest = round_to_nearest(weight, form.block_size, form.limits, self._dtype)
            nearest_noise = output_error(weight, dequantize(nearest), moment)
            noise = output_error(weight, dequantize(best), moment)
            best = _mixed(noise <= nearest_noise, best, nearest)
            errors.nearest_noise += float(nearest_noise.sum())
            errors.output_noise += float(np.minimum(noise, nearest_noise).sum())
            errors.output += float(output_error(weight, np.zeros_like(weight), moment).sum())
        errors.weight += float(np.square(weight, dtype=np.float64).sum())
        errors.weight_noise += float(np.square(weight - dequantize(best), dtype=np.float64).sum())
        return best


def _mixed(
    wins: NDArray[np.bool_], ours: QuantizedWeight, nearest: QuantizedWeight
) -> QuantizedWeight:
    return QuantizedWeight(
        np.where(wins, ours.values, nearest.values), np.where(wins, ours.scale, nearest.scale)
    )


def _relative(noise: float, signal: float) -> float | None:
    return float(np.sqrt(max(noise, 0) / signal)) if signal > 0 else None
