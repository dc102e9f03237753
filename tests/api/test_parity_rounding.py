"""A half-precision bundle beside PyTorch in the same dtype and in float32, with fakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from support.parity_fakes import FakeModel, FakeReference, fake_cases

from vlmport.api.parity import ParityOptions, make_report
from vlmport.api.parity_compare import compare
from vlmport.api.parity_html import report_html
from vlmport.api.parity_measure import compare_arrays, fault_of, limits_of
from vlmport.api.parity_render import print_report
from vlmport.api.parity_report import CaseReport, report_from_json, report_json, worst_verdict
from vlmport.api.parity_summary import answer_totals, summarize, summarize_rounding
from vlmport.api.progress import SilentProgress
from vlmport.api.tolerances import tolerance_for
from vlmport.contract import KVLayout, Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

Edit = Callable[[NDArray[np.float32]], None]


def rounded(array: NDArray[Any]) -> NDArray[np.float32]:
    return array.astype(np.float16).astype(np.float32)


@dataclass
class HalfReference(FakeReference):
    """The fake in float16: weights, features and logits are rounded."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = super().run(graph, inputs)
        return {name: rounded(array) for name, array in outputs.items()}

    def logits(self, messages: Any) -> NDArray[np.float32]:
        return rounded(super().logits(messages))


class WideModel(FakeModel):
    """A bundle with weights in float16 that computes in float32."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = FakeReference().run(graph, inputs)
        is_lookup = graph == "embed_tokens"
        return {name: rounded(array) if is_lookup else array for name, array in outputs.items()}


def run(model: FakeModel, float32: FakeReference | None = None) -> tuple[CaseReport, ...]:
    return compare(
        model.reference,
        model,
        fake_cases(),
        16,
        SilentProgress(),
        precision="float16",
        float32=float32 or FakeReference(),
    )


def messages(reports: tuple[CaseReport, ...]) -> str:
    return "\n".join(finding.message for report in reports for finding in report.findings)


def verdict(reports: tuple[CaseReport, ...]) -> str:
    return worst_verdict(report.verdict for report in reports)


def test_a_bundle_that_rounds_as_pytorch_does_passes() -> None:
    reports = run(FakeModel(HalfReference()))
    assert (verdict(reports), messages(reports)) == ("PASS", "")
    picture = reports[1]
    assert [check.quantity for check in picture.rounding] == [
        "vision_encoder",
        "projector",
        "embed_tokens",
        "logits",
    ]
    for check in picture.rounding:
        assert check.bundle == check.pytorch
        assert check.pytorch.max_abs
    logits = picture.rounding[-1].pytorch.max_abs
    assert logits is not None
    assert picture.logits_limit == 4 * logits
    assert picture.float32_token_ids == picture.reference_token_ids


def test_a_bundle_that_is_nearer_to_float32_than_pytorch_passes() -> None:
    reports = run(WideModel(HalfReference()))
    assert (verdict(reports), messages(reports)) == ("PASS", "")
    assert [check.bundle.max_abs for check in reports[1].rounding[:2]] == [0.0, 0.0]


@pytest.mark.parametrize("graph", ["vision_encoder", "projector"])
def test_an_error_beyond_rounding_fails_against_both(graph: str) -> None:
    reports = run(FakeModel(HalfReference(), {graph: lambda array: array * np.float32(1.01)}))
    assert verdict(reports) == "FAIL"
    assert f"{graph}, case 'picture': max_abs" in messages(reports)
    assert f"{graph} beside PyTorch in float32, case 'picture': max_abs" in messages(reports)
    assert "(4 times PyTorch's own rounding of " in messages(reports)


def test_a_lookup_must_be_exact_in_half_precision_too() -> None:
    reports = run(FakeModel(HalfReference(), {"embed_tokens": lambda array: array + 1e-6}))
    assert "embed_tokens, case 'text': max_abs 1.01e-06; tolerance 0" in messages(reports)


def test_logits_beyond_rounding_fail_and_a_fork_within_it_is_a_near_tie() -> None:
    def tie(logits: NDArray[np.float32]) -> None:
        logits[2, 7], logits[2, 8] = 9.0, 8.9995

    def turned(name: str, logits: NDArray[np.float32]) -> None:
        if name == "text":
            logits[2, 8] = logits[2, 7] + np.float32(2**-11)

    def wrong(name: str, logits: NDArray[np.float32]) -> None:
        if name == "picture":
            logits[1, 3] += 0.1

    near = run(FakeModel(HalfReference(edit_logits=tie), edit_logits=turned), FakeReference())
    assert verdict(near) == "NEAR_TIE", messages(near)
    assert near[0].fork is not None
    assert near[0].fork.margin == 2 * (near[0].logits_limit or 0.0)
    far = run(FakeModel(HalfReference(), edit_logits=wrong))
    assert "decoder logits, case 'picture', step 1: max_abs 0.1" in messages(far)


def test_a_float32_side_that_is_no_number_gives_no_tolerance() -> None:
    row = tolerance_for("logits", "bfloat16")
    values = np.ones(3, np.float32)
    broken = compare_arrays(values, np.array([1.0, np.nan, 1.0]))
    same = compare_arrays(values, values)
    assert limits_of(same, row, broken) == (None, None)
    assert limits_of(same, row, None) == (None, None)
    assert fault_of(same, row, "PyTorch", broken) == (
        "no tolerance: PyTorch's rounding is not known, its float32 side is faulty"
    )


def test_half_precision_needs_the_float32_reference() -> None:
    with pytest.raises(AssertionError):
        compare(
            HalfReference(), FakeModel(), fake_cases(), 4, SilentProgress(), precision="float16"
        )


def test_a_report_shows_both_comparisons(sample_manifest: Manifest) -> None:
    half = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float16")
    manifest = replace(sample_manifest, precision="float16", kv_layout=half)
    options = ParityOptions(Path("the checkpoint"), Path("the bundle"))
    report = make_report(options, manifest, run(FakeModel(HalfReference())), backend="a fake")
    assert {row.precision for row in report.tolerances} == {"float16"}
    rows = summarize_rounding(report)
    assert [row.check for row in rows][-1] == "logits"
    assert all(row.bundle == row.pytorch for row in rows)
    assert [row.check for row in summarize(report)][-1] == "logits"
    tokens = next(words for check, words, _ in answer_totals(report) if check == "greedy_tokens")
    assert tokens == "all 21 tokens equal; of 21 in float32 21, PyTorch in float16 21"
    console = Console(record=True, width=120)
    print_report(report, console)
    assert "Beside PyTorch in float32" in console.export_text()
    page = report_html(report)
    assert "what float16 does to the bundle and to PyTorch" in page
    assert "PyTorch&#39;s rounding" in page or "PyTorch's rounding" in page
    assert report_from_json(report_json(report)) == report


def test_a_float32_report_shows_one_comparison(sample_manifest: Manifest) -> None:
    cases = compare(FakeReference(), FakeModel(), fake_cases(), 16, SilentProgress())
    options = ParityOptions(Path("the checkpoint"), Path("the bundle"))
    report = make_report(options, sample_manifest, cases, backend="a fake")
    assert summarize_rounding(report) == []
    assert "in float32:" not in report_html(report)
    assert all(case.logits_limit == 1e-4 and not case.rounding for case in cases)
