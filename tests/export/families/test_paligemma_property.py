"""Drawn PaliGemma configurations: none gives other answers than transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.paligemma_checkpoints import PaliGemmaRecipe, make_paligemma

from vlmport.api.builtin_cases import Case
from vlmport.api.export import ExportOptions, export
from vlmport.api.parity_bundle import open_bundle
from vlmport.api.parity_compare import compare
from vlmport.api.progress import SilentProgress
from vlmport.export.family import load_reference

EXAMPLES = 50
SOFTCAPS = st.one_of(st.none(), st.floats(1.0, 50.0))


@st.composite
def recipes(draw: st.DrawFn) -> PaliGemmaRecipe:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    tower_heads = draw(st.integers(1, 3))
    patch_size = draw(st.sampled_from((6, 14, 16)))
    language_model = draw(st.sampled_from(("gemma", "gemma2")))
    layers = draw(st.sampled_from((1, 1, 2)))
    text_settings: dict[str, Any] = {
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-3))),
        "rope_theta": draw(st.sampled_from((100.0, 10_000.0, 500_000.0))),
    }
    if language_model == "gemma2":
        kinds = st.sampled_from(("sliding_attention", "full_attention"))
        text_settings["layer_types"] = [draw(kinds) for _ in range(layers)]
    return PaliGemmaRecipe(
        language_model=language_model,
        # The side need not be a multiple: the patches leave a rest of the picture out.
        image_size=patch_size * draw(st.integers(1, 5)) + draw(st.integers(0, 5)),
        patch_size=patch_size,
        # Not fewer channels: of a tower of 4, float32 is off by 3.4e-5 of float64 in PyTorch itself
        # (in ONNX Runtime by 1.4e-5), which is more than the tolerance.
        tower_hidden=tower_heads * draw(st.sampled_from((16, 20, 24))),
        tower_layers=1,
        tower_heads=tower_heads,
        # Gemma 2 asks for a multiple of the heads, though head_dim is a setting of its own.
        hidden_size=heads * draw(st.integers(3, 8)),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((2, 8, 16, 34, 256))),
        intermediate=draw(st.integers(1, 80)),
        # Not 1: with that, transformers 5.23 keeps the whole cache (it slices it by -0), and its
        # generate differs from its own forward without a cache.
        sliding_window=draw(st.sampled_from((2, 3, 7, 16, 30, 4096, 8192))),
        query_pre_attn_scalar=draw(st.integers(1, 256)),
        attn_softcap=draw(SOFTCAPS),
        final_softcap=draw(SOFTCAPS),
        attention_bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        layout=draw(st.sampled_from(("hub", "bin", "nested", "saved"))),
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        seed=draw(st.integers(0, 2**16)),
        text_settings=text_settings,
    )


def cases(seed: int) -> tuple[Case, ...]:
    generator = np.random.default_rng(seed)
    pictures = []
    for _ in range(3):
        width, height = (int(side) for side in generator.integers(1, 90, 2))
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        pictures.append(Image.fromarray(pixels))
    image = {"type": "image"}
    words = "detect cat ; dog " * int(generator.integers(1, 4))
    return (
        Case("one", (image, {"type": "text", "text": "caption en"}), (pictures[0],)),
        Case("two", (image, image, {"type": "text", "text": words}), tuple(pictures[1:])),
    )


@pytest.mark.slow
@pytest.mark.longest
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # an export takes seconds, a search for less minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(recipe=recipes())
def test_no_configuration_answers_otherwise_than_transformers(recipe: PaliGemmaRecipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_paligemma(Path(folder) / "checkpoint", recipe)
        export(ExportOptions(checkpoint, Path(folder) / "bundle"), SilentProgress())
        reports = compare(
            load_reference(checkpoint),
            open_bundle(Path(folder) / "bundle"),
            cases(recipe.seed),
            8,
            SilentProgress(),
        )
    findings = [finding.message for report in reports for finding in report.findings]
    assert all(report.verdict == "PASS" for report in reports), "\n".join(findings)
