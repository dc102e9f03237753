"""Bundles of configurations that are drawn at random equal transformers."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.checkpoints import Recipe, make_checkpoint
from support.parity_cases import mixed_cases

from vlmport.api.export import ExportOptions, export
from vlmport.api.parity_bundle import open_bundle
from vlmport.api.parity_compare import compare
from vlmport.api.parity_report import worst_verdict
from vlmport.api.progress import SilentProgress
from vlmport.export.family import load_reference

LANGUAGE_MODELS = ("llama", "phi", "stablelm", "gemma", "qwen2")
CONNECTORS = (
    "identity",
    "linear",
    "mlp1x_gelu",
    "mlp2x_gelu",
    "mlp3x_gelu",
    "resampler",
    "qformer",
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """A checkpoint that Factory could have trained, or LLaVA in transformers' layout."""
    language_model = draw(st.sampled_from(LANGUAGE_MODELS))
    tower = draw(st.sampled_from(("clip", "siglip", "dinov2", "mof")))
    layout = draw(st.sampled_from(("merged", "separate")))
    connector = "mof_mlp" if tower == "mof" else draw(st.sampled_from(CONNECTORS))
    aspect, select = (
        draw(st.sampled_from(("square", "pad"))),
        draw(st.sampled_from(("patch", "cls_patch"))),
    )
    if language_model != "phi" and tower in ("clip", "siglip") and draw(st.booleans()):
        layout, connector, aspect = "transformers", "mlp2x_gelu", "square"
    recipe = Recipe(
        language_model,
        tower,
        connector,
        aspect,
        select,
        layout,
        tied=language_model in ("llama", "gemma", "qwen2") and draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    patch = draw(st.sampled_from((8, 14, 16)))
    text, heads = draw(text_sizes(language_model)), draw(st.sampled_from((2, 4)))
    vision = {
        "hidden_size": dict(text)["hidden_size"] if connector == "identity" else 16 * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "patch_size": patch,
        # Of Dinov2, whose pictures are not of the size of its position embedding.
        "image_size": patch * draw(st.integers(2, 5)),
    }
    seen = patch * draw(st.integers(2, 4))
    return replace(recipe, text=text, vision=tuple(vision.items()), seen=seen)


@st.composite
def text_sizes(draw: st.DrawFn, language_model: str) -> tuple[tuple[str, object], ...]:
    kv_heads = draw(st.sampled_from((1, 2)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 3)))
    head_dim = draw(st.sampled_from((8, 16, 32)))
    # Towers of an identity connector have as many numbers, in 2 or 4 heads.
    hidden = heads * head_dim
    sizes: dict[str, object] = {
        "hidden_size": hidden if hidden % 4 == 0 else 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw(st.sampled_from((1, 2))),
        "intermediate_size": draw(st.sampled_from((24, 64))),
        "vocab_size": draw(st.sampled_from((320, 333))),
    }
    if language_model in ("phi", "stablelm"):
        sizes["partial_rotary_factor"] = draw(st.sampled_from((0.25, 0.5, 1.0)))
    if language_model == "stablelm":
        sizes["use_qkv_bias"] = draw(st.booleans())
    if language_model == "llama":
        sizes["attention_bias"] = sizes["mlp_bias"] = draw(st.booleans())
    if language_model == "gemma":
        sizes["head_dim"] = draw(st.sampled_from((16, 32)))
    if language_model == "qwen2" and draw(st.booleans()):
        window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}
        sizes |= window
    return tuple(sizes.items())


@pytest.mark.slow
@pytest.mark.longest
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking would export dozens of models more
    suppress_health_check=[HealthCheck.too_slow],
)
@given(recipe=recipes())
def test_drawn_configurations_equal_transformers(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "checkpoint", recipe)
        bundle = Path(folder) / "bundle"
        export(ExportOptions(checkpoint, bundle), SilentProgress())
        reference, model = load_reference(checkpoint), open_bundle(bundle)
        reports = compare(reference, model, mixed_cases()[1:2], 4, SilentProgress())
    findings = [finding.message for report in reports for finding in report.findings]
    assert worst_verdict(report.verdict for report in reports) == "PASS", (recipe, findings)
