from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from support.parity_fakes import FakeModel, FakeReference, fake_cases

from vlmport.api.agreement import Agreement
from vlmport.api.progress import SilentProgress
from vlmport.api.quantized_graphs import graph_signals
from vlmport.api.quantized_report import BundleFigures
from vlmport.api.quantized_verdict import findings_of, input_findings
from vlmport.api.tolerances import QUANTIZED_TOLERANCES, quantized_tolerances
from vlmport.errors import ParityError

ROWS = quantized_tolerances({"int8-weight-only", "float"})
GOOD = Agreement(
    questions=2,
    steps=9,
    nonfinite_steps=0,
    kl_mean=1e-4,
    kl_max=1e-3,
    top1_agreement=1.0,
    top5_overlap=1.0,
    rank_mean=1.0,
    rank_max=1,
    logit_error=0.01,
    logits_snr_db=40.0,
    answers_equal=1.0,
    first_differences=(None, None),
)


def figures(agreement: Agreement = GOOD, model: FakeModel | None = None) -> BundleFigures:
    graphs = graph_signals(FakeReference(), model or FakeModel(), fake_cases(), SilentProgress())
    return BundleFigures("the bundle", 100, graphs, agreement)


def test_figures_within_their_limits_are_no_finding() -> None:
    assert findings_of(figures(), ROWS) == []


@pytest.mark.parametrize(
    ("agreement", "check", "words"),
    [
        (replace(GOOD, kl_mean=0.5), "kl_mean", "mean KL 0.5 nats; tolerance 0.02"),
        (replace(GOOD, logits_snr_db=3.0), "logits_snr", r"logits 3.0 dB; tolerance 24 dB"),
        (replace(GOOD, top1_agreement=0.5), "top1_agreement", "50.0% have .* tolerance 85%"),
        (
            replace(GOOD, kl_mean=None, logits_snr_db=None, nonfinite_steps=3),
            "kl_mean",
            "3 have NaN or Inf",
        ),
    ],
)
def test_each_figure_of_next_tokens_is_judged(agreement: Agreement, check: str, words: str) -> None:
    [finding] = findings_of(figures(agreement), ROWS)
    assert finding.check == check
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(finding.message)


def test_a_noisy_or_broken_image_graph_is_a_finding() -> None:
    def noisy(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return features * np.float32(1.5)

    def broken(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return features * np.float32(np.nan)

    [finding] = findings_of(figures(model=FakeModel(edits={"projector": noisy})), ROWS)
    assert finding.message.startswith("projector, ")
    assert "6.0 dB; tolerance 22 dB" in finding.message
    [finding] = findings_of(figures(model=FakeModel(edits={"projector": broken})), ROWS)
    assert "NaN or Inf" in finding.message


def test_a_graph_of_another_shape_is_an_error() -> None:
    model = FakeModel(edits={"projector": lambda features: features[..., :-1]})
    with pytest.raises(ParityError, match=r"projector, .*the reference has"):
        figures(model=model)


def test_pixels_and_prompts_must_be_equal() -> None:
    reference, case = FakeReference(), fake_cases()[1]
    prompt = reference.prompt_ids(case.messages)
    assert input_findings(reference, FakeModel(), case, prompt, prompt) == []
    off = FakeModel(edits={"preprocessing": lambda pixels: pixels + np.float32(0.25)})
    found = input_findings(reference, off, case, prompt[:-1], prompt)
    assert [finding.check for finding in found] == ["prompt_tokens", "preprocessing"]
    assert "max_abs 0.25" in found[1].message


def test_the_coarsest_format_chooses_the_rows() -> None:
    assert {row.format for row in quantized_tolerances({"int4", "int8", "float"})} == {"int4"}
    assert {row.format for row in quantized_tolerances({"int8", "int8-weight-only"})} == {"int8"}
    with pytest.raises(ValueError, match="found none for layers in float"):
        quantized_tolerances({"float"})


def test_every_format_has_every_row_once_with_a_reason() -> None:
    keys = [(row.quantity, row.format) for row in QUANTIZED_TOLERANCES]
    assert len(keys) == len(set(keys)) == 15
    assert all(len(row.reason) > 60 for row in QUANTIZED_TOLERANCES)
