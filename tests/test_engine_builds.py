"""Every bundle of the trained checkpoints becomes TensorRT-RTX engines that mean what it means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engine_builds import CAPACITY, built, small_options
from support.engine_table import ENGINE_ROWS, engine_row
from support.trained import exported, quantized
from tiny.recipes import RECIPES

from vlmport.api.build import build
from vlmport.api.progress import SilentProgress
from vlmport.calibration.default_recipes import TargetPrecision
from vlmport.contract import Manifest
from vlmport.contract_engines import SELECT_GREEDY, SELECT_SAMPLED, AttentionLayer, EngineSet
from vlmport.engine_manifest import load_engine_set
from vlmport.manifest import load_manifest

# Variant -> the precisions that make it of the float32 bundle, one after the other.
VARIANTS: dict[str, tuple[TargetPrecision, ...]] = {
    "fp32": (),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "int8": ("int8",),
    "int8-weight-only": ("int8-weight-only",),
    "int4": ("int4",),
    "fp16 int4": ("fp16", "int4"),
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow) if " " in name else name for name in VARIANTS],
)
@pytest.mark.parametrize("family", sorted(RECIPES))
def test_every_engine_builds(family: str, variant: str, tmp_path: Path) -> None:
    bundle = exported(family)
    for precision in VARIANTS[variant]:
        bundle = quantized(family, bundle, precision, tmp_path / precision)
    manifest = load_manifest(bundle)
    report = build(bundle, small_options(bundle), SilentProgress(), tmp_path / "engines")
    ENGINE_ROWS.append(engine_row(family, variant, report.engines))
    assert load_engine_set(report.folder) == report.engines
    check_engines(manifest, report.engines)
    for layer in attention_layers(report.engines):
        assert layer.fused == (layer.dtype != "float32"), layer
        assert bool(layer.reason) != layer.fused, layer


def check_engines(manifest: Manifest, engines: EngineSet) -> None:
    expected = {graph.name for graph in manifest.graphs} | {SELECT_GREEDY, SELECT_SAMPLED}
    assert {engine.graph for engine in engines.engines} == expected
    for graph in manifest.graphs:
        engine = engines.engine(graph.name)
        assert engine.warnings == (), graph.name
        assert len(engine.attention) == graph.operators.get("Attention", 0)
        names = [port.name for port in engine.outputs]
        assert names == [port.name for port in graph.outputs]
    check_decoder(manifest, engines)
    for layer in attention_layers(engines):
        # A tower sees all patches, or those that a mask names.
        assert layer.masking in {"none", "tensor", "lower_right"}


def check_decoder(manifest: Manifest, engines: EngineSet) -> None:
    decoder = engines.engine("decoder")
    cache = manifest.kv_layout
    assert [profile.name for profile in decoder.profiles] == ["prefill", "decode"]
    in_place = {port.aliases for port in decoder.outputs if port.aliases}
    assert len(in_place) == 2 * cache.num_layers
    kept = [port for port in decoder.inputs if port.name in in_place]
    shape = ("batch", cache.num_kv_heads, CAPACITY, cache.head_dim)
    assert {(port.dtype, port.shape) for port in kept} == {(cache.dtype, shape)}
    is_causal = manifest.attention.prompt == "causal"
    assert len(decoder.attention) == cache.num_layers
    for layer in decoder.attention:
        assert layer.masking == ("lower_right" if is_causal else "none")
        assert layer.lengths.endswith("_int32")
        assert layer.num_kv_heads == cache.num_kv_heads


def attention_layers(engines: EngineSet) -> Iterator[AttentionLayer]:
    return (layer for engine in engines.engines for layer in engine.attention)


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_every_decoder_builds_with_an_explicit_mask(family: str, tmp_path: Path) -> None:
    bundle = quantized(family, exported(family), "fp16", tmp_path / "fp16")
    decoder = built(bundle / "decoder.onnx", bundle, "mask")
    assert {(layer.masking, layer.lengths) for layer in decoder.attention} == {("tensor", "")}
    assert all(layer.fused for layer in decoder.attention)
