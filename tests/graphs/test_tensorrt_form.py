"""Decoders of PaliGemma 2 in the form for TensorRT: equal to the bundle's, and it builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graph_runs import save
from support.paligemma_checkpoints import PaliGemmaRecipe, make_paligemma
from support.single_engines import build_single

from vlmport.api.export import traced_graph
from vlmport.calibration.half_precision import half_precision_
from vlmport.errors import EngineError
from vlmport.export.family import plan_checkpoint
from vlmport.export.stream import save_graph
from vlmport.graphs.tensorrt_form import tensorrt_form
from vlmport.runtime.backends.onnxruntime import open_session

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.calibration.half_precision import HalfKind

# Layers with a window and layers without take turns; the window is shorter than the prompts.
RECIPE = PaliGemmaRecipe("gemma2", kv_heads=2, layers=2, tower_layers=1, sliding_window=8)
BATCH, CAPACITY = 2, 40


@dataclass(frozen=True)
class Call:
    """New tokens of each row of the batch, and the cache rows that they begin at."""

    length: int
    starts: tuple[int, int]
    valid: tuple[int, int]


CALLS = {
    "prefill": Call(12, (0, 0), (12, 12)),
    "decode": Call(1, (12, 12), (13, 13)),
    "chunk": Call(5, (13, 13), (18, 18)),
    "ragged prefill": Call(9, (0, 0), (9, 5)),
    "ragged decode": Call(1, (9, 5), (10, 6)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<precision>/decoder.onnx and projector.onnx."""
    folder = tmp_path_factory.mktemp("paligemma2")
    _, plan = plan_checkpoint(make_paligemma(folder / "checkpoint", RECIPE))
    (folder / "float32").mkdir()
    for graph in plan.graphs:
        if graph.name in {"decoder", "projector"}:
            path = folder / "float32" / f"{graph.name}.onnx"
            save_graph(traced_graph(graph), path, plan.store, lambda _: None)
    kinds: dict[str, HalfKind] = {"float16": "fp16", "bfloat16": "bf16"}
    for precision, kind in kinds.items():  # tracing in half precision takes seconds
        (folder / precision).mkdir()
        model = ir.load(folder / "float32" / "decoder.onnx")
        half_precision_(model, kind, None, {"logits"})
        save(model, folder / precision / "decoder.onnx")
    return folder


def run_calls(path: Path, content: bytes | None) -> dict[str, list[Any]]:
    """Logits and new cache of each call; both forms are fed the cache of the first one."""
    sessions = [open_session(path, 1, "float32", each) for each in (None, content)]
    ports = sessions[0].get_inputs()
    dtype = np.float16 if ports[0].type == "tensor(float16)" else np.float32
    hidden, past = ports[0].shape[2], [port.name for port in ports[4:]]
    heads, head_dim = ports[4].shape[1], ports[4].shape[3]
    cache = [np.zeros((BATCH, heads, CAPACITY, head_dim), dtype) for _ in past]
    generator = np.random.default_rng(1)
    found = {}
    for name, call in CALLS.items():
        starts = np.array(call.starts)
        feed = {
            "inputs_embeds": generator.normal(size=(BATCH, call.length, hidden)).astype(dtype),
            "position_ids": starts[:, None] + np.arange(call.length)[None] + 1,
            "write_indices": starts,
            "valid_lengths": np.array(call.valid),
            **dict(zip(past, cache, strict=True)),
        }
        kept, other = (session.run(None, feed) for session in sessions)
        cache = kept[1:]
        found[name] = [kept, other]
    return found


def test_every_call_of_a_whole_decoder_is_equal(folder: Path) -> None:
    path = folder / "float32" / "decoder.onnx"
    for name, (kept, other) in run_calls(path, tensorrt_form(path)).items():
        for old, new in zip(kept, other, strict=True):
            np.testing.assert_allclose(new, old, atol=5e-6, err_msg=name)


def test_half_precision_is_equal_but_for_rounding(folder: Path) -> None:
    """Both forms are as far from float32; the weights are the same, rounded."""
    exact_path, path = (folder / kind / "decoder.onnx" for kind in ("float32", "float16"))
    exact = run_calls(exact_path, None)
    for name, (kept, other) in run_calls(path, tensorrt_form(path)).items():
        logits = exact[name][0][0]
        rounding = np.abs(kept[0] - logits).max()
        assert 0 < np.abs(other[0] - logits).max() <= 2 * rounding, name
        assert rounding < 5e-3, name


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_tensorrt_builds_it(precision: str, folder: Path) -> None:
    path = folder / precision / "decoder.onnx"
    result = build_single(path)
    assert result.engine.warnings == ()
    assert result.engine.attention == ()
    assert result.layers["SOFTMAX"] == RECIPE.layers
    assert result.layers["KV_CACHE_UPDATE"] == 2 * RECIPE.layers
    assert result.layers["ATTENTION_INPUT"] == 0


def test_tensorrt_refuses_the_bundles_own_form(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it does not, the pass is no longer needed."""
    monkeypatch.setattr("vlmport.graphs.engine_source.tensorrt_form", lambda _: None)
    with pytest.raises(EngineError, match="softcap"):
        build_single(folder / "float32" / "decoder.onnx")


def test_weights_still_lie_beside_the_file(folder: Path) -> None:
    path = folder / "float32" / "decoder.onnx"
    content = tensorrt_form(path)
    assert content is not None
    before, after = onnx.load(str(path), load_external_data=False), onnx.ModelProto()
    after.ParseFromString(content)
    assert placed(after) == placed(before)
    assert len(placed(before)) > 10


def placed(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    return [
        (weight.name, *(f"{entry.key}={entry.value}" for entry in weight.external_data))
        for weight in model.graph.initializer
        if weight.external_data
    ]


def test_a_graph_without_a_soft_cap_stays_the_file_itself(folder: Path) -> None:
    assert tensorrt_form(folder / "float32" / "projector.onnx") is None
