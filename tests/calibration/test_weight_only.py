from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.weight_graphs import fused_operators, model_with, run_file, save

from vlmport.calibration.layers import find_layers
from vlmport.calibration.recipe import LayerFormat, WeightMethod
from vlmport.calibration.statistics import GraphStatistics, ValueStatistics
from vlmport.calibration.weight_only import QuantizedLayer, block_size_for, quantize_weights_
from vlmport.errors import CalibrationError

TWO_LAYERS = """g (float[n, IN] x, float[IN, 48] first, float[40, 48] second)
    => (float[n, 40] y) { h = MatMul(x, first) r = Tanh(h) y = Gemm <transB = 1> (r, second) }"""
NEAREST = WeightMethod(rounding="nearest")
GPTQ = WeightMethod(rounding="gptq", int8_rounding="gptq")


def two_layers(in_channels: int = 96, dtype: Any = np.float32) -> ir.Model:
    generator = np.random.default_rng(0)
    arrays = {
        "first": generator.normal(size=(in_channels, 48)).astype(dtype),
        "second": generator.normal(size=(40, 48)).astype(dtype),
    }
    body = TWO_LAYERS.replace("IN", str(in_channels))
    return model_with(body if dtype == np.float32 else body.replace("float[", "float16["), arrays)


def statistics(**inputs: np.ndarray) -> GraphStatistics:
    return {
        name: ValueStatistics(
            len(seen),
            float(seen.min()),
            float(seen.max()),
            0.0,
            second_moment=(seen.T @ seen).astype(np.float32),
        )
        for name, seen in inputs.items()
    }


def correlated(channels: int, positions: int = 400) -> np.ndarray:
    generator = np.random.default_rng(1)
    mixed = generator.normal(size=(positions, 8)) @ generator.normal(size=(8, channels))
    return mixed + 0.2 * generator.normal(size=mixed.shape)


def quantize(
    model: ir.Model,
    asked: LayerFormat | dict[str, LayerFormat],
    method: WeightMethod,
    seen: GraphStatistics | None = None,
) -> tuple[QuantizedLayer, ...]:
    layers = find_layers(model)
    formats: dict[str, LayerFormat] = {}
    for layer in layers:
        formats[layer.name] = asked[layer.name] if isinstance(asked, dict) else asked
    told: list[int] = []
    results = quantize_weights_(model, layers, formats, method, seen or {}, told.append)
    assert told == [result.float_bytes for result in results]
    return results


@pytest.mark.parametrize(
    ("in_channels", "asked", "expected"),
    [(576, 128, 64), (576, 32, 32), (1536, 128, 128), (96, 64, 32), (2700, 128, None)],
)
def test_block_sizes_divide_the_input_channels(
    in_channels: int, asked: int, expected: int | None
) -> None:
    assert block_size_for(in_channels, asked) == expected


@pytest.mark.parametrize("asked", ["int4", "int8-weight-only"])
@pytest.mark.parametrize("method", [NEAREST, GPTQ], ids=["nearest", "gptq"])
def test_graph_computes_with_the_rounded_weights(
    asked: LayerFormat, method: WeightMethod, tmp_path: Path
) -> None:
    model = two_layers(96)
    seen = statistics(x=correlated(96), r=np.tanh(correlated(48)))
    results = quantize(model, asked, method, seen)
    path = save(model, tmp_path)
    weights = []
    for name in ("first", "second"):
        kind = "int4" if f"{name}.int4" in model.graph.initializers else "int8"
        values, scale = (
            model.graph.initializers[f"{name}.{part}"].const_value.numpy()  # type: ignore[union-attr]
            for part in (kind, "scale")
        )
        scale = np.atleast_2d(scale)
        weights.append(values.astype(np.float64) * np.repeat(scale, len(values) // len(scale), 0))
    x = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    expected = np.tanh(x @ weights[0]) @ weights[1]
    (y,) = run_file(path, {"x": x})
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())
    assert fused_operators(path, tmp_path)["MatMulNBits"] == 2
    # 48 input channels have no block of 32.
    formats = ["int4", "int8-weight-only"] if asked == "int4" else ["int8-weight-only"] * 2
    assert [result.format for result in results] == formats


def test_the_report_says_how_large_and_how_near_a_layer_is() -> None:
    model = two_layers(96)
    first, second = quantize(
        model, "int4", GPTQ, statistics(x=correlated(96), r=np.tanh(correlated(48)))
    )
    assert (first.format, first.rounding, first.block_size) == ("int4", "gptq", 32)
    assert first.note == ""
    assert first.float_bytes == 96 * 48 * 4
    assert first.bytes == 96 * 48 // 2 + 3 * 48 * 4
    assert first.weight_snr_db is not None
    assert 14 < first.weight_snr_db < 25
    assert first.output_error is not None
    assert first.nearest_error is not None
    assert 0 < first.output_error < 0.7 * first.nearest_error
    assert second.note == "48 input channels are no multiple of 32; INT8 instead"
    assert second.bytes == 40 * 48 + 40 * 4


def test_a_smaller_block_is_taken_where_the_asked_one_does_not_divide() -> None:
    (first, _) = quantize(two_layers(192), "int4", WeightMethod(rounding="nearest", block_size=128))
    assert first.block_size == 64
    assert first.note == "192 input channels are no multiple of 128; 64 is"


def test_errors_are_those_of_the_outputs() -> None:
    model, seen = two_layers(96), correlated(96)
    source = model.graph.initializers["first"].const_value
    assert source is not None
    weight = source.numpy().astype(np.float64)
    layers = find_layers(model)
    formats: dict[str, LayerFormat] = {layers[0].name: "int4", layers[1].name: "float"}
    (result,) = quantize(model, formats, NEAREST, statistics(x=seen))
    values, scale = (
        model.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
        for name in ("first.int4", "first.scale")
    )
    rounded = values.astype(np.float64) * np.repeat(scale, 32, axis=0)
    relative = np.linalg.norm(seen @ (weight - rounded)) / np.linalg.norm(seen @ weight)
    assert result.output_error == pytest.approx(relative, rel=1e-3)
    noise = np.linalg.norm(weight - rounded) / np.linalg.norm(weight)
    assert result.weight_snr_db == pytest.approx(-20 * np.log10(noise), rel=1e-4)
    assert "second" in model.graph.initializers


def test_no_output_channel_is_worse_than_with_rounding_to_nearest() -> None:
    seen = correlated(96, positions=3)  # of low rank, where compensation may go astray
    results = [
        quantize(two_layers(96), "int4", m, statistics(x=seen, r=seen[:, :48]))[0]
        for m in (NEAREST, GPTQ)
    ]
    assert results[1].nearest_error == results[0].output_error
    assert results[1].output_error is not None
    assert results[0].output_error is not None
    assert results[1].output_error <= results[0].output_error


def test_half_precision_graphs_get_half_precision_scales(tmp_path: Path) -> None:
    model = two_layers(96, np.float16)
    quantize(model, "int4", NEAREST)
    save(model, tmp_path)
    assert model.graph.initializers["first.scale"].dtype == ir.DataType.FLOAT16


def test_layers_of_other_formats_are_left_alone() -> None:
    model = two_layers()
    layers = find_layers(model)
    formats: dict[str, LayerFormat] = {layers[0].name: "int8", layers[1].name: "float"}
    assert quantize(model, formats, NEAREST) == ()
    assert find_layers(model) == layers or len(find_layers(model)) == 2


def test_a_convolution_stays_float_and_says_so() -> None:
    body = """g (float[n, 3, 8, 8] x, float[16, 3, 4, 4] w) => (float[n, 16, 2, 2] y)
        { y = Conv <strides = [4, 4]> (x, w) }"""
    model = model_with(body, {"w": np.ones((16, 3, 4, 4), np.float32)})
    (result,) = quantize(model, "int4", NEAREST)
    assert (result.format, result.bytes) == ("float", result.float_bytes)
    assert "convolution" in result.note
    assert "w" in model.graph.initializers


def test_compensation_needs_second_moments() -> None:
    with pytest.raises(CalibrationError, match=r"first: no second moment .* round to nearest"):
        quantize(two_layers(), "int4", GPTQ)


def test_an_input_that_was_always_zero_rounds_to_nearest() -> None:
    seen = statistics(x=np.zeros((4, 96)), r=np.zeros((4, 48)))
    results = quantize(two_layers(), "int4", GPTQ, seen)
    assert [result.output_error for result in results] == [None, None]


def test_infinite_activations_name_the_module() -> None:
    seen = np.ones((4, 96))
    seen[0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        moments = statistics(x=seen, r=np.ones((4, 48)))
    with pytest.raises(CalibrationError, match="first: the second moment of its input holds NaN"):
        quantize(two_layers(), "int4", GPTQ, moments)


def test_a_weight_that_is_not_finite_names_the_module() -> None:
    model = two_layers()
    source = model.graph.initializers["second"].const_value
    assert source is not None
    source.numpy()[3, 5] = np.nan
    with pytest.raises(CalibrationError, match="second: its weight holds NaN"):
        quantize(model, "int8-weight-only", NEAREST)


@pytest.mark.parametrize("rounding", ["awq", "awq+gptq"])
def test_a_scaled_input_is_made_up_for_by_the_norm_before_it(rounding: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    gain = np.exp(generator.normal(size=96)).astype(np.float32)
    weight = generator.normal(size=(96, 48)).astype(np.float32)
    body = """g (float[n, 96] x, float[96] gain, float[96, 48] w) => (float[n, 48] y)
        { h = RMSNormalization(x, gain) y = MatMul(h, w) }"""
    model = model_with(body, {"gain": gain, "w": weight})
    x = correlated(96).astype(np.float32)
    normal = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5)
    method = WeightMethod(rounding=rounding)
    (result,) = quantize(model, "int4", method, statistics(h=normal * gain))
    assert result.rounding == rounding
    assert result.scale_exponent is not None
    divided, values, step = (
        model.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
        for name in ("gain", "w.int4", "w.scale")
    )
    scale = gain / divided
    assert scale.max() / scale.min() > 1.5
    scaled = values.astype(np.float64) * np.repeat(step, 32, axis=0)
    (y,) = run_file(save(model, tmp_path), {"x": x})
    expected = (normal * gain) @ (scaled / scale[:, None].astype(np.float64))
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())
    wanted = (normal * gain) @ weight.astype(np.float64)
    error = np.linalg.norm(y - wanted) / np.linalg.norm(wanted)
    # The report's error comes from the second moment of the unscaled input alone.
    assert result.output_error == pytest.approx(error, rel=1e-3)


def test_an_input_that_an_int8_layer_reads_is_not_scaled() -> None:
    generator = np.random.default_rng(0)
    arrays = {"gain": np.ones(96), "v": generator.normal(size=(96, 48))}
    arrays["w"] = generator.normal(size=(96, 48))
    body = """g (float[n, 96] x, float[96] gain, float[96, 48] v, float[96, 48] w)
        => (float[n, 48] y, float[n, 48] z)
        { h = RMSNormalization(x, gain) y = MatMul(h, v) z = MatMul(h, w) }"""
    model = model_with(body, {name: array.astype(np.float32) for name, array in arrays.items()})
    seen = statistics(h=correlated(96) * np.exp(generator.normal(size=96)))
    (result,) = quantize(model, {"v": "int8", "w": "int4"}, WeightMethod(rounding="awq"), seen)
    assert result.scale_exponent is None
    gain = model.graph.initializers["gain"].const_value
    assert gain is not None
    np.testing.assert_array_equal(gain.numpy(), 1)
