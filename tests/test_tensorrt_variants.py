"""Every kind of graph that the families export, and no trained checkpoint has, builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from support.checkpoints import Recipe, make_checkpoint
from support.fuyu_checkpoints import FuyuRecipe, make_fuyu_checkpoint
from support.idefics2_checkpoints import Idefics2Recipe, make_idefics2
from support.mask_weights import save_mask_weights
from support.paligemma_checkpoints import PaliGemmaRecipe, make_paligemma
from support.single_engines import build_single

from vlmport.api.export import traced_graph
from vlmport.export.family import plan_checkpoint
from vlmport.export.mask_decoder import with_mask_decoder
from vlmport.export.precision import in_precision
from vlmport.export.stream import save_graph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE = ("vision_encoder", "projector")


@dataclass(frozen=True)
class Variant:
    make: Callable[[Path], Path]
    graphs: tuple[str, ...]


def factory(recipe: Recipe) -> Callable[[Path], Path]:
    return lambda folder: make_checkpoint(folder, recipe)


# Heads are of 16 where TensorRT-RTX 1.7 has no kernel for those of the smallest checkpoints.
VARIANTS = {
    "clip, resampler, stablelm": Variant(
        factory(Recipe("stablelm", "clip", "resampler")), (*IMAGE, "decoder")
    ),
    "dinov2, qformer, qwen2 with a window": Variant(
        factory(Recipe("qwen2", "dinov2", "qformer", window=24)), (*IMAGE, "decoder")
    ),
    "two towers, mof_mlp": Variant(factory(Recipe("llama", "mof", "mof_mlp")), IMAGE),
    "dinov2-giant": Variant(factory(Recipe("llama", "dinov2-giant", "mlp3x_gelu")), IMAGE[:1]),
    "several layers of a tower": Variant(
        factory(Recipe("qwen2", "siglip", layout="transformers", layers=(-2, -3, 1))),
        IMAGE,
    ),
    "mistral with a window": Variant(
        lambda folder: make_idefics2(
            folder,
            Idefics2Recipe(
                splits=True, sliding_window=7, head_dim=16, resampler_head_dim=16, tower_heads=2
            ),
        ),
        ("projector", "decoder"),
    ),
    "persimmon without normalized heads": Variant(
        lambda folder: make_fuyu_checkpoint(folder, FuyuRecipe(qk_layernorm=False)), ("decoder",)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_builds_in_half_precision(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    _, plan = plan_checkpoint(variant.make(tmp_path / "checkpoint"))
    graphs = [
        graph for graph in in_precision(plan, "float16").graphs if graph.name in variant.graphs
    ]
    assert len(graphs) == len(variant.graphs)
    for graph in graphs:
        path = tmp_path / f"{graph.name}.onnx"
        save_graph(traced_graph(graph), path, plan.store, lambda _: None)
        assert build_single(path).engine.warnings == ()


@pytest.mark.slow
def test_mask_decoder_builds(tmp_path: Path) -> None:
    """It is float32 in every bundle; TensorRT-RTX 1.7 builds no ConvTranspose in bfloat16."""
    checkpoint = make_paligemma(tmp_path / "checkpoint", PaliGemmaRecipe(layers=1, tower_layers=1))
    weights = save_mask_weights(tmp_path / "masks.npz")
    plan = with_mask_decoder(plan_checkpoint(checkpoint)[1], weights)
    graph = next(graph for graph in plan.graphs if graph.name == "mask_decoder")
    path = tmp_path / "mask_decoder.onnx"
    save_graph(traced_graph(graph), path, plan.store, lambda _: None)
    assert build_single(path).engine.warnings == ()
