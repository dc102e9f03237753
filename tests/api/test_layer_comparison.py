from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from support.hand_quantized import quantize_by_hand

from vlmport.api.builtin_cases import builtin_cases
from vlmport.api.layer_comparison import LayerTable, compare_layers
from vlmport.api.progress import SilentProgress
from vlmport.api.quantized_verdict import layer_findings
from vlmport.api.reference_answers import GreedyAnswer, ask_reference
from vlmport.api.tolerances import quantized_tolerances
from vlmport.calibration.layers import find_layers
from vlmport.runtime import Request, VisionLanguageModel
from vlmport.runtime.messages import parse_messages

DOUBLED = "language_model.model.layers.1.mlp.down_proj"
Compared = tuple[VisionLanguageModel, tuple[GreedyAnswer, ...]]


@pytest.fixture(scope="module")
def compared(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    model = VisionLanguageModel.load(trained_bundle)
    requests = [
        Request(messages=parse_messages(case.messages), images=case.images)
        for case in builtin_cases()[1:4]
    ]
    folder = tmp_path_factory.mktemp("logits")
    return model, ask_reference(model, requests, folder, SilentProgress())


def table(compared: Compared, source: Path, bundle: Path) -> LayerTable:
    model, answers = compared
    return compare_layers(source, bundle, model, answers, SilentProgress())


def test_a_bundle_beside_itself_is_exact(compared: Compared, trained_bundle: Path) -> None:
    found = table(compared, trained_bundle, trained_bundle)
    assert all(layer.signal.is_exact for layer in found.layers)
    assert found.missing == ()
    for graph in ("vision_encoder", "projector", "decoder"):
        layers = find_layers(ir.load(trained_bundle / f"{graph}.onnx"))
        names = [layer.layer for layer in found.layers if layer.graph == graph]
        assert names == [layer.name for layer in layers]
    # Prompts and decode steps both went through the decoder.
    _, answers = compared
    first = next(layer for layer in found.layers if layer.graph == "decoder")
    steps = sum(min(4, len(answer.token_ids) - 1) for answer in answers)
    model = compared[0]
    prompts = sum(len(model.prompt_embeddings(answer.request)) for answer in answers)
    assert first.signal.elements % (steps + prompts) == 0


@pytest.mark.parametrize("form", ["int8-weight-only", "int4"])
def test_only_a_wrong_scale_is_a_finding(
    compared: Compared, trained_bundle: Path, tmp_path: Path, form: str
) -> None:
    rows = quantized_tolerances({form})
    good = quantize_by_hand(trained_bundle, tmp_path / "good", form)  # type: ignore[arg-type]
    found = table(compared, trained_bundle, good)
    assert layer_findings(found, rows) == []
    assert all(layer.signal.snr_db is not None for layer in found.layers)
    bad = quantize_by_hand(trained_bundle, tmp_path / "bad", form, {DOUBLED: 2.0})  # type: ignore[arg-type]
    [finding] = layer_findings(table(compared, trained_bundle, bad), rows)
    assert finding.message.startswith(f"decoder, {DOUBLED}: its channels are ")
    assert "a scale is wrong" in finding.message


def test_a_layer_that_lost_its_name_is_told(
    compared: Compared, trained_bundle: Path, tmp_path: Path
) -> None:
    bundle = quantize_by_hand(trained_bundle, tmp_path / "renamed")
    model = ir.load(bundle / "projector.onnx")
    layer = find_layers(ir.load(trained_bundle / "projector.onnx"))[0]
    for node in model.graph:
        for value in node.outputs:
            if value.name == layer.node.outputs[0].name:
                value.name = "another"
    ir.save(model, bundle / "projector.onnx")
    found = table(compared, trained_bundle, bundle)
    assert found.missing == (f"projector: {layer.name}",)
