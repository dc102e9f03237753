from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from support.engine_builds import parsed_layers
from support.graph_cases import build, operators
from support.quantization_graphs import (
    FAMILIES,
    decoder_calls,
    graph_ids,
    image_inputs,
    measure,
    open_session,
    run_decoder,
)
from support.trained import exported

from vlmport.calibration.activation_int8 import quantize_activations_
from vlmport.calibration.layers import find_layers
from vlmport.calibration.recipe import ActivationMethod
from vlmport.calibration.statistics import ValueStatistics
from vlmport.errors import CalibrationError
from vlmport.export.recipe import RECIPE_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.calibration.recipe import LayerFormat

GRAPHS = [
    (kind, family)
    for kind in ("decoder", "vision_encoder", "projector")
    for family in graph_ids(kind)
]
MIN_MAX = ActivationMethod(observer="min_max", smoothing=None)
# ONNX Runtime's kernels that multiply integers.
FUSED = {"MatMul": "MatMulIntegerToFloat", "Gemm": "QGemm"}


def quantized(path: Path, calls: Sequence[Mapping[str, NDArray[Any]]]) -> ir.Model:
    """The graph with all layers INT8, ranges those of the calls."""
    model = ir.load(path)
    layers = find_layers(model)
    statistics = measure(model, [layer.activation for layer in layers], calls)
    formats: dict[str, LayerFormat] = {layer.name: "int8" for layer in layers}
    told: list[int] = []
    done = quantize_activations_(model, layers, formats, MIN_MAX, statistics, told.append)
    assert [found.layer for found in done] == [layer.name for layer in layers]
    assert len(told) == len(layers)
    return model


def calls_of(kind: str, family: str) -> list[Mapping[str, NDArray[Any]]]:
    if kind == "decoder":
        return list(decoder_calls(ir.load(exported(family) / "decoder.onnx")))
    return [image_inputs(family, kind)]


@pytest.mark.parametrize(("kind", "family"), GRAPHS)
def test_every_product_is_fused(kind: str, family: str, tmp_path: Path) -> None:
    """With the session options of the runtime: nothing is disabled."""
    path = exported(family) / f"{kind}.onnx"
    layers = find_layers(ir.load(path))
    model = quantized(path, calls_of(kind, family))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    open_session(model, options)
    found = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    for operator, fused in FUSED.items():
        wanted = sum(layer.operator == operator for layer in layers)
        assert found[fused] == wanted, operator
        assert found[operator] == 0, operator
    convolutions = sum(layer.operator == "Conv" for layer in layers)
    assert found["QuantizeLinear"] == len(layers)
    # Only those of a convolution stay, its weight's and its picture's.
    assert found["DequantizeLinear"] == 2 * convolutions


def test_layers_that_share_an_activation_are_fused(tmp_path: Path) -> None:
    body = """g (float[n, 64] x, float[64, 32] v, float[64, 32] w)
        => (float[n, 32] y, float[n, 32] z) { y = MatMul(x, v) z = MatMul(x, w) }"""
    rng = np.random.default_rng(0)
    model = with_weights(body, {name: rng.normal(size=(64, 32)) for name in "vw"})
    (first, second) = quantize_one_range(model, 4.0)
    assert first == second
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    open_session(model, options)
    found = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert found == {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2}


def with_weights(body: str, arrays: Mapping[str, NDArray[Any]]) -> ir.Model:
    model = build(body)
    for value in [value for value in model.graph.inputs if value.name in arrays]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[str(value.name)].astype(np.float32), name=value.name)
        model.graph.initializers.add(value)
    return model


def quantize_one_range(model: ir.Model, amax: float) -> list[float]:
    layers = find_layers(model)
    formats: dict[str, LayerFormat] = {layer.name: "int8" for layer in layers}
    seen = ValueStatistics(1, -amax, amax, amax)
    names = {str(layer.activation.name): seen for layer in layers}
    done = quantize_activations_(model, layers, formats, MIN_MAX, names, lambda _: None)
    return [found.scale for found in done]


def fake_quantized(
    x: NDArray[np.float64], w: NDArray[np.float64], amax: float, output_axis: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Activation and weight as INT8 represents them, in float64."""
    step = np.float64(np.float32(amax / 127))
    rounded = np.clip(np.rint(x / step), -128, 127) * step
    axes = tuple(axis for axis in range(w.ndim) if axis != output_axis)
    steps = (np.abs(w).max(axes, keepdims=True).astype(np.float32) / np.float32(127)).astype(float)
    return rounded, np.clip(np.rint(w / steps), -127, 127) * steps


def test_matmul_equals_reference_in_float64() -> None:
    rng = np.random.default_rng(1)
    x, w, b = rng.normal(size=(5, 64)), rng.normal(size=(64, 32)), rng.normal(size=32)
    body = """g (float[5, 64] x, float[64, 32] w, float[32] b) => (float[5, 32] y)
        { p = MatMul(x, w) y = Add(p, b) }"""
    x, w, b = (array.astype(np.float32).astype(float) for array in (x, w, b))
    model = with_weights(body, {"w": w, "b": b})
    quantize_one_range(model, 2.0)
    found = np.asarray(open_session(model).run(None, {"x": x.astype(np.float32)})[0])
    rounded, weights = fake_quantized(x, w, 2.0, 1)
    np.testing.assert_allclose(found, rounded @ weights + b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_gemm_equals_reference_in_float64(bias: bool) -> None:
    rng = np.random.default_rng(2)
    x, w, b = (
        rng.normal(size=size).astype(np.float32).astype(float) for size in ((5, 64), (32, 64), 32)
    )
    inputs = "x, w, b" if bias else "x, w"
    body = f"""g (float[5, 64] x, float[32, 64] w, float[32] b) => (float[5, 32] y)
        {{ y = Gemm <transB=1> ({inputs}) }}"""
    model = with_weights(body, {"w": w, "b": b})
    quantize_one_range(model, 2.5)
    assert operators(model)["Add"] == bias
    found = np.asarray(open_session(model).run(None, {"x": x.astype(np.float32)})[0])
    rounded, weights = fake_quantized(x, w, 2.5, 0)
    np.testing.assert_allclose(found, rounded @ weights.T + b * bias, rtol=0, atol=1e-5)


def test_convolution_equals_reference_in_float64() -> None:
    rng = np.random.default_rng(3)
    x, w, b = (
        rng.normal(size=size).astype(np.float32).astype(float)
        for size in ((2, 3, 8, 8), (16, 3, 4, 4), 16)
    )
    body = """g (float[2, 3, 8, 8] x, float[16, 3, 4, 4] w, float[16] b) => (float[2, 16, 2, 2] y)
        { y = Conv <kernel_shape=[4, 4], strides=[4, 4]> (x, w, b) }"""
    model = with_weights(body, {"w": w, "b": b})
    quantize_one_range(model, 3.0)
    found = np.asarray(open_session(model).run(None, {"x": x.astype(np.float32)})[0])
    rounded, weights = fake_quantized(x, w, 3.0, 0)
    patches = rounded.reshape(2, 3, 2, 4, 2, 4).transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, 2, 48)
    wanted = patches @ weights.reshape(16, 48).T + b
    np.testing.assert_allclose(found, wanted.transpose(0, 3, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_stays_close_over_several_steps(family: str) -> None:
    path = exported(family) / "decoder.onnx"
    calls = calls_of("decoder", family)
    wanted, _ = run_decoder(ir.load(path), calls)
    found, _ = run_decoder(quantized(path, calls), calls)
    for one, other in zip(found, wanted, strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert 0 < error < 0.1


def test_only_layers_of_the_format_change_and_names_survive() -> None:
    model = ir.load(exported("tinyllava") / "decoder.onnx")
    layers = find_layers(model)
    before = {str(value.name) for node in model.graph for value in node.outputs}
    modules = [layer.modules for layer in layers]
    chosen = layers[2]
    statistics = {str(chosen.activation.name): ValueStatistics(1, -1.0, 1.0, 0.5)}
    formats: dict[str, LayerFormat] = {layer.name: "float" for layer in layers}
    formats[chosen.name] = "int8"
    output, weight = str(chosen.node.outputs[0].name), str(chosen.weight.name)
    done = quantize_activations_(model, layers, formats, MIN_MAX, statistics, lambda _: None)
    assert [found.layer for found in done] == [chosen.name]
    assert {str(value.name) for node in model.graph for value in node.outputs} >= before
    assert output in before
    initializers = model.graph.initializers
    assert weight not in initializers
    tensor = initializers[f"{weight}.int8"].const_value
    assert tensor is not None
    assert tensor.metadata_props[RECIPE_KEY].endswith(" | int8")
    assert f"{chosen.name}.input_scale" in initializers
    # What is quantized is no layer any more; the others keep their names.
    rest = find_layers(model)
    assert [layer.modules for layer in rest] == modules[:2] + modules[3:]


def refused(statistics: ValueStatistics | None, weight: float = 1.0) -> None:
    body = "g (float[5, 4] x, float[4, 4] w) => (float[5, 4] y) { y = MatMul(x, w) }"
    model = with_weights(body, {"w": np.full((4, 4), weight)})
    layers = find_layers(model)
    seen = {} if statistics is None else {"x": statistics}
    quantize_activations_(model, layers, {"w": "int8"}, MIN_MAX, seen, lambda _: None)


def test_refuses_activation_without_statistics() -> None:
    with pytest.raises(CalibrationError, match="w: no statistics of its activation 'x'"):
        refused(None)


def test_refuses_activation_that_overflowed() -> None:
    with pytest.raises(CalibrationError, match=r"w: activation 'x': .*finite"):
        refused(ValueStatistics(1, -1.0, np.inf, 0.5))


def test_refuses_weight_that_is_not_finite() -> None:
    with pytest.raises(CalibrationError, match="w: 4 output channels have weights"):
        refused(ValueStatistics(1, -1.0, 1.0, 0.5), np.nan)


def test_represents_what_is_always_zero() -> None:
    body = "g (float[5, 4] x, float[4, 4] w) => (float[5, 4] y) { y = MatMul(x, w) }"
    model = with_weights(body, {"w": np.zeros((4, 4))})
    assert quantize_one_range(model, 0.0) == [1.0]
    found = open_session(model).run(None, {"x": np.zeros((5, 4), np.float32)})[0]
    assert not np.asarray(found).any()


@pytest.mark.parametrize(("kind", "family"), GRAPHS)
def test_tensorrt_reads_every_quantized_layer(kind: str, family: str, tmp_path: Path) -> None:
    path = exported(family) / f"{kind}.onnx"
    model = quantized(path, calls_of(kind, family))
    written = tmp_path / f"{kind}.onnx"
    ir.save(model, written, external_data=f"{kind}.onnx.data")
    found = parsed_layers(written)  # test_engine_builds.py builds them
    count = len(find_layers(ir.load(path)))
    assert found["QUANTIZE"] == count
    assert found["DEQUANTIZE"] == 2 * count
