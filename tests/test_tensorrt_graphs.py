"""Every graph of the trained checkpoints parses and builds in TensorRT-RTX, with what it means."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support.tensorrt_build import BuildError, build_graph
from support.trained import exported
from tiny.recipes import EXAMPLES, RECIPES

from vlmport.api.progress import SilentProgress
from vlmport.api.quantize import QuantizeOptions, quantize
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.calibration.default_recipes import TargetPrecision

# An ONNX operator that TensorRT has a layer of its own for.
OWN_LAYERS = {
    "Attention": "ATTENTION_INPUT",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    "TensorScatter": "KV_CACHE_UPDATE",
}


@pytest.fixture(scope="module", params=sorted(RECIPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Variant -> the precisions that make it of the float32 bundle, one after the other. INT8 weights
# alone are built in calibration/test_weight_only_bundles.py.
VARIANTS: dict[str, tuple[TargetPrecision, ...]] = {
    "fp32": (),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "int8": ("int8",),
    "int4": ("int4",),
    "fp16 int4": ("fp16", "int4"),
}
# TensorRT says this of a convolution; it is what is wanted.
SCALES = re.compile(r"Converting conv (activation|weight) scales to fp32")


@pytest.mark.parametrize(
    "variant",
    [name if name == "fp32" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_every_graph_builds(name: str, variant: str, tmp_path: Path) -> None:
    bundle = exported(name)
    for precision in VARIANTS[variant]:
        bundle = quantized(name, bundle, precision, tmp_path / precision)
    graphs = sorted(bundle.glob("*.onnx"))
    assert {"decoder", "embed_tokens", "projector"} <= {path.stem for path in graphs}
    for path in graphs:
        check_build(path)


def quantized(name: str, bundle: Path, precision: TargetPrecision, target: Path) -> Path:
    """By the default recipe, on two questions."""
    folder = "questions" if name == "tinyllava" else f"questions-{name}"
    recipe = RecipeOptions(precision)
    data = EXAMPLES / folder / "heldout.jsonl"
    options = QuantizeOptions(bundle, target, recipe, calibration=data, max_samples=2)
    quantize(options, SilentProgress())
    return target


def check_build(path: Path) -> None:
    result = build_graph(path)
    assert result.engine_bytes > 0
    assert [text for text in result.warnings if not SCALES.search(text)] == [], path.name
    model = onnx.load(str(path), load_external_data=False)
    nodes = Counter(node.op_type for node in model.graph.node)
    assert result.bounded_attentions == nodes["TensorScatter"] // 2, path.name  # keys and values
    for operator, layer in OWN_LAYERS.items():
        assert result.layers.get(layer, 0) == nodes[operator], (path.name, operator)


def attention(folder: Path, lengths: str) -> Path:
    """One attention over 8 rows whose valid ones a port names, and the same rows unread."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2, 8, 32]) for n in "qkv"]
    ports.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [1]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 32])
    inputs = ["q", "k", "v", "", "", "", lengths]
    node = helper.make_node("Attention", inputs, ["y"], name="attend", is_causal=1)
    model = helper.make_model(
        helper.make_graph([node], "attend", ports, [output]),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    path = folder / "attend.onnx"
    onnx.save(model, path)
    return path


def test_valid_lengths_reach_the_attention(tmp_path: Path) -> None:
    assert build_graph(attention(tmp_path, "lengths")).bounded_attentions == 1


def test_an_ignored_input_fails_the_build(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="ignores the inputs \\['lengths'\\]"):
        build_graph(attention(tmp_path, ""))


def test_a_graph_that_does_not_parse_fails(tmp_path: Path) -> None:
    path = attention(tmp_path, "lengths")
    model = onnx.load(str(path))
    model.graph.node[0].attribute.append(helper.make_attribute("softmax_precision", 1))
    onnx.save(model, path)
    with pytest.raises(BuildError, match=r"does not parse: .*softmax precision"):
        build_graph(path)
