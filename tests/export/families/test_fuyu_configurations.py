"""Whatever the configuration, a Fuyu bundle answers as transformers does."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fuyu_checkpoints import FuyuRecipe, make_fuyu_checkpoint

from vlmport.api.builtin_cases import builtin_cases
from vlmport.api.export import ExportOptions, export
from vlmport.api.parity_bundle import open_bundle
from vlmport.api.parity_compare import compare
from vlmport.api.progress import SilentProgress
from vlmport.export.family import load_reference

NEW_TOKENS = 6


@st.composite
def recipes(draw: st.DrawFn) -> FuyuRecipe:
    heads = draw(st.integers(1, 5))
    # Rotary takes an even part of a head, or all of it.
    head_dim = draw(st.sampled_from((4, 8, 12, 16, 20, 32)))
    rotary = draw(st.sampled_from((0.25, 0.5, 0.75, 1.0)).filter(lambda p: head_dim * p % 2 == 0))
    patch = draw(st.integers(1, 12))
    # Few enough tokens to be quick; twelve pixels, so that something is left of every picture.
    fewest = -(-12 // patch)
    rows, columns = draw(st.integers(fewest, fewest + 4)), draw(st.integers(fewest, fewest + 9))
    return FuyuRecipe(
        hidden_size=heads * head_dim,
        heads=heads,
        layers=draw(st.sampled_from((1, 1, 1, 1, 1, 2))),
        intermediate_size=draw(st.integers(1, 96)),
        patch=patch,
        max_height=rows * patch,
        max_width=columns * patch,
        rotary=rotary,
        theta=draw(st.sampled_from((100.0, 10000.0, 25000.0, 1e6))),
        rope_factor=draw(st.sampled_from((None, None, 2.0))),
        qk_layernorm=draw(st.booleans()),
        numbers=draw(st.integers(10, 400)),
        layout=draw(st.sampled_from(("hub", "transformers"))),
        # A flat config.json has no place for the rotary part; transformers takes a half.
        is_flat=rotary == 0.5 and draw(st.booleans()),
        tied=draw(st.booleans()),
        file=draw(st.sampled_from(("shards", "bin"))),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.slow
@pytest.mark.longest
@settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=(HealthCheck.too_slow,)
)
@given(recipes())
def test_any_configuration_answers_as_transformers(recipe: FuyuRecipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_fuyu_checkpoint(Path(folder) / "checkpoint", recipe)
        bundle = Path(folder) / "bundle"
        export(ExportOptions(checkpoint, bundle), SilentProgress())
        cases = builtin_cases()[:5]
        reports = compare(
            load_reference(checkpoint), open_bundle(bundle), cases, NEW_TOKENS, SilentProgress()
        )
    findings = [finding.message for report in reports for finding in report.findings]
    assert [report.verdict for report in reports] == ["PASS"] * len(reports), findings
