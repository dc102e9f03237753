"""SmoothQuant: outlying channels of activations become larger weights before INT8.

Source: Xiao et al. 2022, "SmoothQuant", equation 4 and section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.calibration.migration import find_migrations, migrate_
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from vlmport.calibration.layers import Layer
    from vlmport.calibration.migration import Migration
    from vlmport.calibration.recipe import ActivationMethod, LayerFormat
    from vlmport.calibration.statistics import GraphStatistics

__all__ = ["SmoothedLayers", "smooth_", "smoothing_scale"]


# A channel counts with at least this share of the largest one's range.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class SmoothedLayers:
    """An activation that was smoothed.

    Attributes:
        layers: names of the layers that read it.
        amax: its largest magnitude before.
        smoothed_amax: the same after.
        largest: largest divisor of a channel.
        smallest: smallest divisor of a channel.
    """

    layers: tuple[str, ...]
    amax: float
    smoothed_amax: float
    largest: float
    smallest: float


def smooth_(
    model: ir.Model,
    layers: Sequence[Layer],
    formats: Mapping[str, LayerFormat],
    method: ActivationMethod,
    statistics: GraphStatistics,
) -> tuple[SmoothedLayers, ...]:
    """Moves ranges of channels into weights, in place, wherever that is exact.

    Statistics of the activations are of the unsmoothed graph and no longer true afterwards.

    Args:
        model: the float graph.
        layers: those of `find_layers`, all of them.
        formats: layer name -> format; activations that no "int8" layer reads stay as they are.
        method: `smoothing` is SmoothQuant's alpha; None does nothing.
        statistics: of the "int8" layers' activations, with the largest magnitude of each channel.

    Returns:
        What was smoothed, in the order of the layers. `refused_migrations` says why others cannot.

    Raises:
        CalibrationError: if an activation has no statistics of its channels, or not finite ones.
    """
    if method.smoothing is None:
        return ()
    done: list[SmoothedLayers] = []
    for migration in find_migrations(model, layers):
        if not any(formats[layer.name] == "int8" for layer in migration.layers):
            continue
        seen = _channel_amax(migration, statistics)
        scale = smoothing_scale(migration, seen, method.smoothing)
        migrate_(model, migration, scale)
        done.append(
            SmoothedLayers(
                tuple(layer.name for layer in migration.layers),
                float(seen.max()),
                float((seen / scale).max()),
                float(scale.max()),
                float(scale.min()),
            )
        )
    return tuple(done)


def smoothing_scale(
    migration: Migration, activation_amax: NDArray[np.float32], alpha: float
) -> NDArray[np.float32]:
    """The divisor of each channel: amax(X_j) ** alpha / amax(W_j) ** (1 - alpha).

    amax(W_j) is the paper's. Taken relative to each output channel's range, since each has a scale
    of its own, it made layers less noisy and the model no better (SmolLM2-135M, alpha 0.8:
    perplexity +2.5 % in place of +1.9 %).

    Channels that share a scale count as one, with their largest activation and weight. A channel
    without activations or weights has nothing to balance and is left alone. The divisors'
    geometric mean is 1: a common factor changes nothing after quantization, and so neither half
    precision nor a cache of scaled values sees other magnitudes than before.

    Args:
        migration: whose channels.
        activation_amax: float32 [channels].
        alpha: 0 moves the weights' ranges wholly into the activation, 1 the other way round.

    Returns:
        float32 [channels], > 0, equal within the groups of the migration.
    """
    weight_amax = np.zeros(migration.channels)
    for layer in migration.layers:
        assert layer.weight.const_value is not None
        weight = np.abs(layer.weight.const_value.numpy())
        rows = weight.max(axis=layer.output_axis).astype(np.float64)
        weight_amax = np.maximum(weight_amax, rows)
    activation = _over_groups(migration, activation_amax.astype(np.float64))
    weight_amax = _over_groups(migration, weight_amax)
    alive = (activation > 0) & (weight_amax > 0)
    # What calibration data hardly shows, other data may: no channel is enlarged without limit.
    activation = np.maximum(activation, _LEAST_SHARE * activation.max())
    weight_amax = np.maximum(weight_amax, _LEAST_SHARE * weight_amax.max())
    if not alive.any():
        return np.ones(migration.channels, np.float32)
    logs = np.zeros(migration.channels)
    logs[alive] = alpha * np.log(activation[alive]) - (1 - alpha) * np.log(weight_amax[alive])
    logs[alive] -= logs[alive].mean()
    return np.exp(logs).astype(np.float32)


def _over_groups(migration: Migration, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest value of each channel's group."""
    largest = np.zeros_like(values)
    np.maximum.at(largest, migration.groups, values)
    return largest[migration.groups]


def _channel_amax(migration: Migration, statistics: GraphStatistics) -> NDArray[np.float32]:
    """float32 [channels], over the activations of all layers that take the scale."""
    largest = np.zeros(migration.channels, np.float32)
    for layer in migration.layers:
        seen = statistics.get(str(layer.activation.name))
        if seen is None or seen.channel_amax is None:
            msg = (
                f"{layer.name}: no statistics of the channels of {layer.activation.name!r}; "
                "smoothing needs the largest magnitude of each; collect them"
            )
            raise CalibrationError(msg)
        if not np.isfinite(seen.channel_amax).all():
            msg = f"{layer.name}: channels of {layer.activation.name!r} that are not finite"
            raise CalibrationError(msg)
        largest = np.maximum(largest, seen.channel_amax)
    return largest
