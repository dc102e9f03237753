from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from support.quantization_graphs import (
    FAMILIES,
    decoder_calls,
    measure,
    run_decoder,
)
from support.trained import exported

from vlmport.calibration.activation_int8 import quantize_activations_
from vlmport.calibration.layers import find_layers
from vlmport.calibration.migration import find_migrations
from vlmport.calibration.recipe import ActivationMethod
from vlmport.calibration.smooth import smooth_, smoothing_scale
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from vlmport.calibration.migration import Migration
    from vlmport.calibration.recipe import LayerFormat

SMOOTH = ActivationMethod(observer="min_max", smoothing=0.5)
OPENED = "language_model.model.layers.0."


def load(family: str = "tinyllava") -> ir.Model:
    return ir.load(exported(family) / "decoder.onnx")


def formats_of(model: ir.Model, everything: LayerFormat = "int8") -> dict[str, LayerFormat]:
    return {layer.name: everything for layer in find_layers(model)}


def measured(model: ir.Model) -> dict[str, Any]:
    layers = find_layers(model)
    return measure(model, [layer.activation for layer in layers], list(decoder_calls(model)))


def weight_of(model: ir.Model, name: str) -> NDArray[np.float32]:
    value = next(layer.weight for layer in find_layers(model) if layer.name == name)
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def migration_of(model: ir.Model, name: str) -> Migration:
    found = find_migrations(model, find_layers(model))
    return next(migration for migration in found if migration.layers[0].name == name)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_scale_is_equation_4(alpha: float) -> None:
    model = load()
    name = f"{OPENED}mlp.gate_proj+up_proj"
    migration = migration_of(model, name)
    amax = np.random.default_rng(0).uniform(0.1, 40, migration.channels).astype(np.float32)
    scale = smoothing_scale(migration, amax, alpha)
    weight = weight_of(model, name).astype(np.float64)
    wanted = amax.astype(np.float64) ** alpha / np.abs(weight).max(1) ** (1 - alpha)
    # But for a factor that all channels share.
    np.testing.assert_allclose(scale / wanted, np.full(len(scale), scale[0] / wanted[0]), rtol=1e-5)
    assert np.log(scale).mean() == pytest.approx(0, abs=1e-5)


def test_half_way_balances_activations_and_weights() -> None:
    """At 0.5 a channel's activation and weights have the same range, but for a common factor."""
    model = load()
    before = measured(model)
    done = smooth_(model, find_layers(model), formats_of(model), SMOOTH, before)
    assert {name for one in done for name in one.layers} == set(formats_of(model))
    after = measured(model)
    # Of the others, later migrations scale some output channels.
    for layer in find_layers(model)[3::4]:
        seen = after[str(layer.activation.name)].channel_amax
        assert seen is not None
        rows = np.abs(weight_of(model, layer.name)).max(1)
        ratio = (seen / rows)[rows > 0]
        np.testing.assert_allclose(ratio, np.full(len(ratio), np.median(ratio)), rtol=1e-3)
    for one, layer in zip(done, find_layers(model), strict=True):
        seen = after[str(layer.activation.name)]
        assert one.smoothed_amax == pytest.approx(seen.amax, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothed_decoder_computes_the_same(family: str) -> None:
    model, original = load(family), load(family)
    calls = list(decoder_calls(original))
    smooth_(model, find_layers(model), formats_of(model), SMOOTH, measured(original))
    for found, wanted in zip(
        run_decoder(model, calls)[0], run_decoder(original, calls)[0], strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


def int8_error(outlier: float, smoothing: float | None) -> float:
    """Relative error of the logits where one channel of a norm's output is that much larger."""
    model = load()
    layers = find_layers(model)
    for migration in find_migrations(model, layers):
        constant = migration.constants[0]
        value = constant.node.inputs[constant.index]
        if constant.node.op_type == "RMSNormalization":
            assert value is not None
            assert value.const_value is not None
            raised = value.const_value.numpy().copy()
            raised[5] *= outlier
            value.const_value = ir.tensor(raised, name=value.name)
    calls = list(decoder_calls(model))
    wanted = run_decoder(model, calls)[0]
    method = replace(SMOOTH, smoothing=smoothing)
    smooth_(model, layers, formats_of(model), method, measured(model))
    ranges = measured(model)
    quantize_activations_(model, layers, formats_of(model), method, ranges, lambda _: None)
    found = run_decoder(model, calls)[0]
    return float(
        np.linalg.norm(np.stack(found) - np.stack(wanted)) / np.linalg.norm(np.stack(wanted))
    )


def test_smoothing_saves_int8_from_an_outlying_channel() -> None:
    plain, smoothed = int8_error(60.0, None), int8_error(60.0, 0.5)
    assert smoothed < plain / 2


def test_dead_channels_are_left_alone() -> None:
    model = load()
    migration = find_migrations(model, find_layers(model))[0]
    amax = np.ones(migration.channels, np.float32)
    amax[:3] = 0
    scale = smoothing_scale(migration, amax, 0.5)
    assert (scale[:3] == 1).all()
    assert np.isfinite(scale).all()
    assert (smoothing_scale(migration, np.zeros_like(amax), 0.5) == 1).all()


def test_channels_that_must_share_a_scale_take_the_largest() -> None:
    model = load()
    name = f"{OPENED}self_attn.o_proj"
    migration = migration_of(model, name)
    amax = np.ones(migration.channels, np.float32)
    amax[33] = 100  # channel 1 of the second query head, which reads the first head of values
    scale = smoothing_scale(migration, amax, 1.0)
    assert scale[1] == scale[33] == scale.max()
    assert (scale == scale[migration.groups]).all()


@pytest.mark.parametrize("kept", ["float", "int8-weight-only", "int4"])
def test_activations_that_stay_float_are_not_smoothed(kept: LayerFormat) -> None:
    model = load()
    statistics = measured(model)
    assert smooth_(model, find_layers(model), formats_of(model, kept), SMOOTH, statistics) == ()
    none = replace(SMOOTH, smoothing=None)
    assert smooth_(model, find_layers(model), formats_of(model), none, statistics) == ()
    original = load()
    for layer in find_layers(original):
        assert (weight_of(model, layer.name) == weight_of(original, layer.name)).all()


def broken(**changes: Any) -> Mapping[str, Any]:
    statistics = measured(load())
    name = next(iter(statistics))
    return {**statistics, name: replace(statistics[name], **changes)}


def test_refuses_statistics_without_channels() -> None:
    model = load()
    with pytest.raises(CalibrationError, match="no statistics of the channels"):
        smooth_(model, find_layers(model), formats_of(model), SMOOTH, broken(channel_amax=None))


def test_refuses_channels_that_overflowed() -> None:
    model = load()
    amax = np.full(128, np.inf, np.float32)
    with pytest.raises(CalibrationError, match="not finite"):
        smooth_(model, find_layers(model), formats_of(model), SMOOTH, broken(channel_amax=amax))
