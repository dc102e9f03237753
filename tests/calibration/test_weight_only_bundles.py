"""Every quantized layer of every family's graphs keeps its fused kernel and builds in TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.quantization_graphs import FAMILIES, decoder_calls, measure, run_decoder
from support.tensorrt_build import build_graph
from support.trained import exported
from support.weight_graphs import exact_session, fused_operators, save

from vlmport.calibration.layers import find_layers
from vlmport.calibration.recipe import LayerFormat, WeightMethod
from vlmport.calibration.weight_only import quantize_weights_


@pytest.mark.parametrize(("asked", "share"), [("int8-weight-only", 0.27), ("int4", 0.16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_fused_and_every_graph_builds(
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
        built = build_graph(path)
        assert built.layers.get("DEQUANTIZE", 0) == len(quantized), (graph.name, built.layers)
        assert built.warnings == ()
        if graph.stem == "decoder":
            assert sum(r.bytes for r in results) <= share * sum(r.float_bytes for r in results)


@pytest.mark.parametrize("rounding", ["awq", "awq+gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_inputs_are_made_up_for(family: str, rounding: str, tmp_path: Path) -> None:
    """The graph computes with the scaled, rounded weights what a float graph does with them."""
    source = exported(family) / "decoder.onnx"
    model = ir.load(source)
    layers = find_layers(model)
    formats: dict[str, LayerFormat] = {layer.name: "int4" for layer in layers}
    method = WeightMethod(rounding=rounding)  # type: ignore[arg-type]  # one of its words
    calls = list(decoder_calls(model))
    statistics = measure(model, [layer.activation for layer in layers], calls)
    results = quantize_weights_(model, layers, formats, method, statistics, lambda _: None)
    scaled = [result for result in results if result.scale_exponent is not None]
    assert len(scaled) > len(results) / 2
    assert all(result.rounding == rounding for result in results)
    found, _ = run_decoder(model, calls, exact_session(save(model, tmp_path)))
    plain, _ = run_decoder(ir.load(source), calls)
    for ours, wanted in zip(found, plain, strict=True):
        # INT4 is coarse on layers this small; a scale without its inverse is off by its square.
        error = np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)
        assert error < 0.35, (family, error)
