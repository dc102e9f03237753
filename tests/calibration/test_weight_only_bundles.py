"""Every quantized layer of every family's graphs keeps its fused kernel and parses in TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.engine_builds import parsed_layers
from support.quantization_graphs import FAMILIES, decoder_calls, measure, run_decoder
from support.trained import exported
from support.weight_graphs import exact_session, fused_operators, save

from vlmport.calibration.layers import Layer, find_layers
from vlmport.calibration.recipe import LayerFormat, WeightMethod
from vlmport.calibration.statistics import ValueStatistics
from vlmport.calibration.weight_only import quantize_weights_


@pytest.mark.parametrize(("asked", "share"), [("int8-weight-only", 0.27), ("int4", 0.16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_fused_and_tensorrt_reads_it(
    family: str, asked: LayerFormat, share: float, tmp_path: Path
) -> None:
    for graph in sorted(exported(family).glob("*.onnx")):
        model = ir.load(graph)
        layers = find_layers(model)
        formats: dict[str, LayerFormat] = {layer.name: asked for layer in layers}
        results = quantize_weights_(
            model, layers, formats, WeightMethod(rounding="nearest"), {}, lambda _: None
        )
        quantized = [result for result in results if result.format != "float"]
        assert len(quantized) == sum(layer.operator != "Conv" for layer in layers)
        folder = tmp_path / graph.stem
        folder.mkdir()
        path = save(model, folder)
        fused = fused_operators(path, folder)
        assert fused["MatMulNBits"] == len(quantized), (graph.name, fused)
        assert fused["DequantizeLinear"] == 0, (graph.name, fused)
        read = parsed_layers(path)  # test_engine_builds.py builds them
        assert read["DEQUANTIZE"] == len(quantized), (graph.name, read)
        if graph.stem == "decoder":
            assert sum(r.bytes for r in results) <= share * sum(r.float_bytes for r in results)


def uneven(layers: Sequence[Layer]) -> dict[str, ValueStatistics]:
    """Of inputs with a few large channels, which AWQ scales."""
    statistics = {}
    for seed, layer in enumerate(layers):
        generator = np.random.default_rng(seed)
        seen = generator.normal(size=(256, layer.in_channels)).astype(np.float32)
        seen *= np.exp(generator.normal(size=layer.in_channels)).astype(np.float32)
        statistics[str(layer.activation.name)] = ValueStatistics(
            256, float(seen.min()), float(seen.max()), 0.0, second_moment=seen.T @ seen
        )
    return statistics


def int4_error(
    family: str,
    method: WeightMethod,
    statistics: Callable[[ir.Model, Sequence[Layer]], Mapping[str, ValueStatistics]],
    folder: Path,
) -> tuple[float, float]:
    """The largest relative error of the logits of a call, and the share of scaled layers."""
    source = exported(family) / "decoder.onnx"
    model = ir.load(source)
    layers = find_layers(model)
    formats: dict[str, LayerFormat] = {layer.name: "int4" for layer in layers}
    results = quantize_weights_(
        model, layers, formats, method, statistics(model, layers), lambda _: None
    )
    assert all(result.rounding == method.rounding for result in results)
    calls = list(decoder_calls(model))
    found, _ = run_decoder(model, calls, exact_session(save(model, folder)))
    plain, _ = run_decoder(ir.load(source), calls)
    errors = [
        float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))
        for ours, wanted in zip(found, plain, strict=True)
    ]
    return max(errors), sum(r.scale_exponent is not None for r in results) / len(results)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_inputs_are_made_up_for(family: str, tmp_path: Path) -> None:
    """The graph computes with the scaled, rounded weights what a float graph does with them."""
    awq = WeightMethod(rounding="awq")
    error, scaled = int4_error(family, awq, lambda _, layers: uneven(layers), tmp_path)
    assert scaled > 0.5
    # INT4 is coarse on layers this small; a scale without its inverse is off by its square.
    assert error < 0.35


@pytest.mark.parametrize("family", FAMILIES)
def test_error_feedback_makes_up_for_rounding_on_what_was_seen(family: str, tmp_path: Path) -> None:
    def seen(model: ir.Model, layers: Sequence[Layer]) -> Mapping[str, ValueStatistics]:
        return measure(model, [layer.activation for layer in layers], list(decoder_calls(model)))

    plain, _ = int4_error(family, WeightMethod(rounding="awq"), seen, tmp_path)
    with_feedback, _ = int4_error(family, WeightMethod(rounding="awq+gptq"), seen, tmp_path)
    assert with_feedback < plain / 2
