"""Half precision of a trained decoder whose values reach too far, and of graphs that vanish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from support.graph_cases import build
from support.graph_runs import observe, random_inputs, run_saved, run_whole, save

from vlmport.calibration.half_precision import half_precision_, half_probes
from vlmport.calibration.layers import find_layers
from vlmport.errors import CalibrationError
from vlmport.export.recipe import RECIPE_KEY
from vlmport.graphs.passes.convert_precision import ConvertPrecisionPass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.calibration.half_precision import HalfReport
    from vlmport.calibration.statistics import ValueStatistics

REACH = 1e5  # beyond float16's 65504
SECOND = "language_model.model.layers.1"


@pytest.fixture(scope="module")
def decoder(trained_bundle: Path) -> Path:
    return trained_bundle / "decoder.onnx"


def scale_weight(model: ir.Model, module: str, factor: float) -> None:
    layer = next(layer for layer in find_layers(model) if layer.modules == (module,))
    tensor = layer.weight.const_value
    assert tensor is not None
    scaled = ir.tensor(tensor.numpy() * np.float32(factor), name=tensor.name)
    scaled.metadata_props.update(tensor.metadata_props)
    layer.weight.const_value = scaled


@pytest.fixture(scope="module")
def far(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in which the output of one down_proj reaches 1e5."""
    folder = tmp_path_factory.mktemp("far")
    model, module = ir.load(decoder), f"{SECOND}.mlp.down_proj"
    layer = next(layer for layer in find_layers(model) if layer.modules == (module,))
    output = str(layer.node.outputs[0].name)
    reached = statistics(decoder, folder)[output].amax
    scale_weight(model, module, REACH / reached)
    path = save(model, folder / "decoder.onnx")
    assert statistics(path, folder)[output].amax == pytest.approx(REACH, rel=1e-3)
    return path


def statistics(path: Path, folder: Path, position: int = 0) -> dict[str, ValueStatistics]:
    model = ir.load(path)
    return observe(path, half_probes(model), random_inputs(model, position), folder)


def converted(
    path: Path, kind: str, folder: Path, ports: frozenset[str] = frozenset({"logits"})
) -> tuple[HalfReport, dict[str, NDArray[np.float32]]]:
    """The report, and the outputs of the converted graph."""
    model = ir.load(path)
    assert kind in {"fp16", "bf16"}
    seen = statistics(path, folder)
    report = half_precision_(model, "fp16" if kind == "fp16" else "bf16", seen, ports)
    return report, run_whole(model, random_inputs(ir.load(path)), folder)


def test_plain_float16_overflows(far: Path, tmp_path: Path) -> None:
    model = ir.load(far)
    ConvertPrecisionPass("FLOAT16", float32_ports={"logits"})(model)
    assert not np.isfinite(run_whole(model, random_inputs(ir.load(far)), tmp_path)["logits"]).all()


def test_what_overflows_stays_float32_and_is_named(far: Path, tmp_path: Path) -> None:
    expected = run_saved(far, random_inputs(ir.load(far)))
    report, found = converted(far, "fp16", tmp_path)
    largest = np.abs(expected["logits"]).max()
    assert np.abs(found["logits"] - expected["logits"]).max() < 5e-3 * largest
    assert (found["logits"].argmax(-1) == expected["logits"].argmax(-1)).all()
    overflowing = [node for node in report.kept if node.reason == "overflow"]
    first = overflowing[0]
    assert (first.operator, first.module) == ("MatMul", f"{SECOND}.mlp.down_proj")
    assert first.largest == pytest.approx(REACH, rel=1e-3)
    # From there the residual stream reaches as far: its sums and the norms that read it.
    assert {node.operator for node in overflowing[1:]} == {"Add", "RMSNormalization"}
    assert report.unseen == ()
    assert report.converted > 3 * len(report.kept)


def test_nothing_overflows_in_bfloat16(far: Path, tmp_path: Path) -> None:
    expected = run_saved(far, random_inputs(ir.load(far)))
    report, found = converted(far, "bf16", tmp_path)
    assert {node.reason for node in report.kept} == {"positions", "logits"}
    largest = np.abs(expected["logits"]).max()
    assert np.abs(found["logits"] - expected["logits"]).max() < 5e-2 * largest


def test_a_trained_decoder_needs_no_more_than_transformers(decoder: Path, tmp_path: Path) -> None:
    report, _ = converted(decoder, "fp16", tmp_path)
    assert {node.reason for node in report.kept} == {"positions"}


def test_what_cannot_leave_the_graph_is_refused(decoder: Path, tmp_path: Path) -> None:
    model = ir.load(decoder)
    seen = statistics(decoder, tmp_path)
    key = next(node.inputs[1] for node in model.graph if node.op_type == "TensorScatter")
    assert key is not None
    value = seen[str(key.name)]
    seen[str(key.name)] = type(value)(value.positions, -REACH, REACH, 1.0, value.channel_amax)
    with pytest.raises(
        CalibrationError, match=r"present_key_values\.0\.key: .* reaches 1e\+05.*use bf16"
    ):
        half_precision_(model, "fp16", seen, {"logits"})
    # Neither does anything overflow if the cache stays float32, nor in bfloat16.
    ports = {str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)}
    kept = half_precision_(ir.load(decoder), "fp16", seen, ports).kept
    assert {node.operator for node in kept if node.reason == "cache"} == {"Attention"}
    half_precision_(ir.load(decoder), "bf16", seen, {"logits"})


def test_ports_may_all_stay_float32(decoder: Path, tmp_path: Path) -> None:
    inputs = random_inputs(ir.load(decoder))
    expected = run_saved(decoder, inputs)
    model = ir.load(decoder)
    ports = frozenset(str(v.name) for v in (*model.graph.inputs, *model.graph.outputs))
    _, found = converted(decoder, "fp16", tmp_path, ports)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - array).max() < 5e-3 * np.abs(array).max()


def test_scores_beyond_float16_keep_attention_in_float32(decoder: Path, tmp_path: Path) -> None:
    model = ir.load(decoder)
    seen = statistics(decoder, tmp_path)
    node = next(node for node in model.graph if node.op_type == "Attention")
    assert node.inputs[0] is not None
    query = str(node.inputs[0].name)
    value = seen[query]
    amax = value.channel_amax
    assert amax is not None
    far_amax = amax * np.float32(2e4 / amax.max())  # each query fits, the products do not
    seen[query] = type(value)(value.positions, -2e4, 2e4, 1.0, far_amax)
    report = half_precision_(model, "fp16", seen, {"logits"})
    kept = [found for found in report.kept if found.reason == "scores overflow"]
    assert [found.node for found in kept] == [node.name]
    assert kept[0].largest > 32752
    assert kept[0].module.startswith("language_model.model.layers.0.self_attn")


def test_values_without_statistics_are_reported(decoder: Path) -> None:
    model = ir.load(decoder)
    probed = tuple(probe.value for probe in half_probes(model))
    assert half_precision_(model, "fp16", None, {"logits"}).unseen == probed


TINY = """
g (float[2, 8] x) => (float[2, 8] y)
<float[8, 8] weight, float large = {10000000.0}, float floor = {0.000001}>
{
    small = MatMul(x, weight)
    y = Mul(small, large)
}
"""
DIVIDED = """
g (float[2, 8] x) => (float[2, 8] y)
<float[8, 8] weight, float floor = {0.00000001}>
{
    product = MatMul(x, weight)
    square = Mul(product, product)
    divisor = Add(square, floor)
    y = Div(square, divisor)
}
"""


def with_weight(text: str, weight: NDArray[np.float32]) -> ir.Model:
    numbers = ", ".join(str(float(item)) for item in weight.reshape(-1))
    model = build(text.replace("weight,", f"weight = {{{numbers}}},"))
    value = model.graph.initializers["weight"]
    tensor = ir.tensor(weight, name="weight")
    tensor.metadata_props[RECIPE_KEY] = "mlp.down_proj.weight | cast FLOAT"
    value.const_value = tensor
    return model


@pytest.mark.parametrize(
    ("text", "size", "reasons"),
    [
        # The weight is lost already, and what it makes is.
        (TINY, 1e-8, {"vanishing", "small weight"}),
        # The weight is not; its product with small inputs is.
        (TINY, 1e-3, {"vanishing"}),
        (DIVIDED, 1e-3, {"small divisor", "vanishing"}),
    ],
)
def test_what_would_vanish_stays_float32(
    text: str, size: float, reasons: set[str], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    weight = (size * generator.normal(size=(8, 8))).astype(np.float32)
    inputs = {"x": generator.normal(size=(2, 8)).astype(np.float32)}
    if reasons == {"vanishing"}:
        inputs["x"] *= np.float32(1e-4)
    path = save(with_weight(text, weight), tmp_path / "tiny.onnx")
    expected = run_saved(path, inputs)["y"]
    plain = with_weight(text, weight)
    ConvertPrecisionPass("FLOAT16", float32_ports={"x", "y"})(plain)
    lost = run_whole(plain, inputs, tmp_path)["y"]
    assert not np.allclose(lost, expected, rtol=0.05, atol=1e-3 * np.abs(expected).max())
    model = with_weight(text, weight)
    seen = observe(path, half_probes(ir.load(path)), inputs, tmp_path)
    report = half_precision_(model, "fp16", seen, {"x", "y"})
    assert {node.reason for node in report.kept} <= reasons
    assert {node.module for node in report.kept} == {"mlp.down_proj"}
    found = run_whole(model, inputs, tmp_path)["y"]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-3 * np.abs(expected).max())


QUANTIZED = """
g (float[2, 8] x) => (float[2, 8] y)
<int8[8, 8] weight, float[8] scale, float x_scale = {0.03125}, int8 zero = {0}>
{
    x8 = QuantizeLinear(x, x_scale, zero)
    xf = DequantizeLinear(x8, x_scale, zero)
    wf = DequantizeLinear<axis = 1>(weight, scale)
    y = MatMul(xf, wf)
}
"""


@pytest.mark.parametrize(("scale", "kept"), [(2.0**-6, set()), (2.0**-20, {"small weight"})])
def test_scales_of_quantized_numbers_follow(scale: float, kept: set[str], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (8, 8))
    numbers = ", ".join(map(str, weight.reshape(-1)))
    text = QUANTIZED.replace("weight,", f"weight = {{{numbers}}},", 1)
    text = text.replace("scale,", f"scale = {{{', '.join([str(scale)] * 8)}}},", 1)
    inputs = {"x": generator.normal(size=(2, 8)).astype(np.float32)}
    expected = run_whole(build(text), inputs, tmp_path)["y"]
    model = build(text)
    report = half_precision_(model, "fp16", None, {"x", "y"})
    assert {node.reason for node in report.kept} == kept
    assert {node.operator for node in report.kept} <= {"DequantizeLinear", "MatMul"}
    found = run_whole(model, inputs, tmp_path)["y"]
    # An activation at the border of two integers may fall to the other side.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_positions_beyond_256_stay_apart_in_bfloat16(decoder: Path, tmp_path: Path) -> None:
    inputs = random_inputs(ir.load(decoder), first_position=300)
    expected = run_saved(decoder, inputs)["present_key_values.0.key"]
    plain = ir.load(decoder)
    ConvertPrecisionPass("BFLOAT16", float32_ports={"logits"})(plain)
    wrong = run_whole(plain, inputs, tmp_path)["present_key_values.0.key"]
    model = ir.load(decoder)
    report = half_precision_(model, "bf16", None, {"logits"})
    right = run_whole(model, inputs, tmp_path)["present_key_values.0.key"]
    largest = np.abs(expected).max()
    assert np.abs(wrong - expected).max() > 0.2 * largest
    assert np.abs(right - expected).max() < 0.02 * largest
    assert "Cos" in {node.operator for node in report.kept if node.reason == "positions"}
