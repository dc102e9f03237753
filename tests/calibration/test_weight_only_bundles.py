"""Every quantized layer of every family's graphs keeps its fused kernel."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from support.weight_graphs import fused_operators, save
from tiny.recipes import EXAMPLES, RECIPES

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.calibration.layers import find_layers
from vlmport.calibration.recipe import LayerFormat, WeightMethod
from vlmport.calibration.weight_only import quantize_weights_


@pytest.fixture(scope="module", params=sorted(RECIPES))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    export(ExportOptions(EXAMPLES / request.param, folder), SilentProgress())
    return folder


@pytest.mark.parametrize(("asked", "share"), [("int8-weight-only", 0.27), ("int4", 0.16)])
def test_onnxruntime_fuses_every_layer(
    bundle: Path, asked: LayerFormat, share: float, tmp_path: Path
) -> None:
    for graph in sorted(bundle.glob("*.onnx")):
        model = ir.load(graph)
        layers = find_layers(model)
        formats = {layer.name: asked for layer in layers}
        results = quantize_weights_(
            model, layers, formats, WeightMethod(rounding="nearest"), {}, lambda _: None
        )
        quantized = [result for result in results if result.format != "float"]
        assert len(quantized) == sum(layer.operator != "Conv" for layer in layers)
        folder = tmp_path / graph.stem
        folder.mkdir()
        fused = fused_operators(save(model, folder), folder)
        assert fused["MatMulNBits"] == len(quantized), (graph.name, fused)
        assert fused["DequantizeLinear"] == 0, (graph.name, fused)
        if graph.stem == "decoder":
            assert sum(r.bytes for r in results) <= share * sum(r.float_bytes for r in results)
