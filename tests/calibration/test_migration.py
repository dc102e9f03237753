from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from support.graph_cases import build
from support.quantization_graphs import (
    FAMILIES,
    decoder_calls,
    graph_ids,
    image_inputs,
    open_session,
    run_decoder,
)
from support.trained import exported

from vlmport.calibration.layers import find_layers
from vlmport.calibration.migration import (
    Migration,
    find_migrations,
    migrate_,
    refused_migrations,
)
from vlmport.errors import CalibrationError
from vlmport.export.recipe import RECIPE_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

OPENED = "language_model.model.layers.0."


def scale_of(migration: Migration, seed: int) -> NDArray[np.float32]:
    drawn = 2 ** np.random.default_rng(seed).uniform(-3, 3, migration.channels)
    return drawn.astype(np.float32)[migration.groups]


def migrated(path: Path) -> tuple[ir.Model, dict[str, NDArray[np.float32]]]:
    """The graph with each migration done twice, and the scales of each layer."""
    model = ir.load(path)
    scales: dict[str, NDArray[np.float32]] = {}
    for seed, migration in enumerate(find_migrations(model, find_layers(model))):
        first, second = scale_of(migration, seed), scale_of(migration, 1000 + seed)
        migrate_(model, migration, first)
        migrate_(model, migration, second)
        scales.update({layer.name: first * second for layer in migration.layers})
    return model, scales


def assert_equal(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    # Each product is rounded otherwise; nothing else changes.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_computes_the_same_over_several_steps(family: str) -> None:
    path = exported(family) / "decoder.onnx"
    model, scales = migrated(path)
    original = ir.load(path)
    # Every matrix of these decoders can be scaled.
    assert set(scales) == {layer.name for layer in find_layers(original)}
    calls = list(decoder_calls(original))
    wanted, wanted_cache = run_decoder(original, calls)
    found, found_cache = run_decoder(model, calls)
    for one, other in zip(found, wanted, strict=True):
        assert_equal(one, other)
    assert_equal(found_cache["past_key_values.0.key"], wanted_cache["past_key_values.0.key"])
    assert not np.allclose(
        found_cache["past_key_values.0.value"], wanted_cache["past_key_values.0.value"]
    )


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, name) for kind in ("vision_encoder", "projector") for name in graph_ids(kind)],
)
def test_image_graph_computes_the_same(kind: str, family: str) -> None:
    path = exported(family) / f"{kind}.onnx"
    model, scales = migrated(path)
    layers = find_layers(ir.load(path))
    refused = refused_migrations(ir.load(path), layers)
    assert set(scales) | set(refused) == {layer.name for layer in layers}
    assert bool(scales) == (kind == "vision_encoder" or family == "idefics2")
    inputs = image_inputs(family, kind)
    wanted = open_session(ir.load(path)).run(None, inputs)[0]
    assert_equal(np.asarray(open_session(model).run(None, inputs)[0]), np.asarray(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_sees_scaled_activations_and_weights(family: str) -> None:
    path = exported(family) / "decoder.onnx"
    model, scales = migrated(path)
    found, wanted = find_layers(model), find_layers(ir.load(path))
    feeds = next(decoder_calls(model))
    for new, old in zip(found, wanted, strict=True):
        assert new.name == old.name
    activations = [_activations(ir.load(path), feeds), _activations(model, feeds)]
    for new, old in zip(found, wanted, strict=True):
        scale = scales[old.name]
        before, after = (seen[str(old.activation.name)] for seen in activations)
        assert_equal(after * scale, before)
        # Output channels may be divided for the next layer.
        rows = np.moveaxis(_array(new.weight), new.input_axis, 0)
        old_rows = np.moveaxis(_array(old.weight), old.input_axis, 0) * scale[:, None]
        ratios = np.where(old_rows == 0, 1, rows / np.where(old_rows == 0, 1, old_rows))
        np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:1], ratios.shape), rtol=1e-4)


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def _activations(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    values = {str(layer.activation.name): layer.activation for layer in find_layers(model)}
    for value in values.values():
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.extend(values.values())
    session = open_session(model)
    cache = {
        value.name: np.zeros((2, value.shape[1], 24, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    results = session.run(list(values), {**feeds, **cache})
    return dict(zip(values, map(np.asarray, results), strict=True))


def test_grouped_queries_share_the_scale_of_their_values() -> None:
    model = ir.load(exported("tinyllava") / "decoder.onnx")
    migrations = {
        layer.name: migration
        for migration in find_migrations(model, find_layers(model))
        for layer in migration.layers
    }
    output = migrations[f"{OPENED}self_attn.o_proj"]
    # 4 heads of queries, 2 of keys and values, 32 channels each.
    heads = output.groups.reshape(4, 32)
    assert (heads[0] == np.arange(32)).all()
    assert (heads[1] == heads[0]).all()
    assert (heads[3] == heads[2]).all()
    assert len(np.unique(heads)) == 64
    assert output.caches == ("past_key_values.0.value",)
    wrong = np.ones(128, np.float32)
    wrong[0] = 2
    with pytest.raises(CalibrationError, match="must share a scale"):
        migrate_(model, output, wrong)


@pytest.mark.parametrize("number", [0.0, -1.0, np.nan, np.inf])
def test_refuses_scale_that_is_no_positive_number(number: float) -> None:
    model = ir.load(exported("tinyllava") / "decoder.onnx")
    migration = find_migrations(model, find_layers(model))[0]
    scale = np.ones(migration.channels, np.float32)
    scale[3] = number
    with pytest.raises(CalibrationError, match="finite numbers > 0"):
        migrate_(model, migration, scale)


def test_weights_are_computed_when_asked_and_keep_their_recipe() -> None:
    path = exported("paligemma") / "decoder.onnx"
    model, _ = migrated(path)
    for layer, old in zip(find_layers(model), find_layers(ir.load(path)), strict=True):
        assert isinstance(layer.weight.const_value, ir.LazyTensor)
        assert old.weight.const_value is not None
        recipe = old.weight.const_value.metadata_props[RECIPE_KEY]
        assert layer.weight.const_value.metadata_props[RECIPE_KEY] == recipe
        assert layer.modules == old.modules


def refusals(body: str, arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, str]:
    model = build(body)
    for name, array in arrays.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers.add(value)
    return dict(refused_migrations(model, find_layers(model)))


SQUARE = {"w": np.eye(4, dtype=np.float32), "g": np.ones(4, np.float32)}


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("h = LayerNormalization(x, g) t = MatMul(h, w) y = Add(t, h)", "read by Add as well"),
        ("h = LayerNormalization(x, g) z = Softmax(h) y = MatMul(z, w)", "computed by Softmax"),
        ("y = MatMul(x, w)", "enters the graph from outside"),
        ("h = LayerNormalization(x, g) k = Mul(h, g) y = MatMul(k, w)", "has other readers"),
    ],
)
def test_refuses_activation(nodes: str, reason: str) -> None:
    body = f"g (float[2, 4] x, float[4, 4] w, float[4] g) => (float[2, 4] y) {{ {nodes} }}"
    (found,) = refusals(body, SQUARE).values()
    assert reason in found


def test_refuses_activation_that_leaves_the_graph() -> None:
    body = """g (float[2, 4] x, float[4, 4] w, float[4] g) => (float[2, 4] h, float[2, 4] y) {
        h = LayerNormalization(x, g) y = MatMul(h, w) }"""
    assert "leaves the graph" in refusals(body, SQUARE)["w"]


def test_refuses_fused_qkv_reader_in_another_order() -> None:
    """A second reader that sees the channels transposed cannot take the same scale."""
    body = """g (float[2, 4] x, float[4, 4] w, float[4] g, float[2, 2] v, int64[3] s)
        => (float[2, 4] y, float[2, 2, 2] z) {
        h = LayerNormalization(x, g) r = Reshape(h, s) z = MatMul(r, v) y = MatMul(h, w) }"""
    found = refusals(body, {**SQUARE, "v": np.eye(2, dtype=np.float32)})
    assert set(found) == {"w", "v"}
