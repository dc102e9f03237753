from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.parity_fakes import FakeModel, FakeReference, fake_cases

from vlmport.api.parity_compare import compare
from vlmport.api.parity_report import CaseReport, worst_verdict
from vlmport.api.progress import SilentProgress


def run(model: FakeModel, max_new_tokens: int = 16) -> tuple[CaseReport, ...]:
    return compare(model.reference, model, fake_cases(), max_new_tokens, SilentProgress())


def verdict(reports: tuple[CaseReport, ...]) -> str:
    return worst_verdict(report.verdict for report in reports)


def messages(reports: tuple[CaseReport, ...]) -> str:
    return "\n".join(finding.message for report in reports for finding in report.findings)


def planted(name: str, change: Callable[[NDArray[np.float32]], None]) -> Any:
    def edit(case: str, logits: NDArray[np.float32]) -> None:
        if case == name:
            change(logits)

    return edit


def tie(logits: NDArray[np.float32]) -> None:
    """Brings two tokens of step 2 within 1e-4 of each other: 7 before 8."""
    logits[2, 7], logits[2, 8] = 9.0, 8.9999


def turned(logits: NDArray[np.float32]) -> None:
    logits[2, 7], logits[2, 8] = 8.99994, 8.99997


def test_an_exact_bundle_passes() -> None:
    reports = run(FakeModel())
    assert verdict(reports) == "PASS"
    assert messages(reports) == ""
    text, picture, two = reports
    assert [check.quantity for check in text.checks] == ["embed_tokens"]
    assert [check.quantity for check in picture.checks] == [
        "preprocessing",
        "vision_encoder",
        "projector",
        "embed_tokens",
    ]
    assert two.images == ("8x6 RGB", "5x5 L")
    assert len(text.steps) == 7
    assert all(report.batch and report.batch.max_abs == 0.0 for report in reports)


def test_answers_may_be_cut_by_max_new_tokens() -> None:
    reports = run(FakeModel(), max_new_tokens=3)
    assert verdict(reports) == "PASS"
    assert [len(report.steps) for report in reports] == [3, 3, 3]


def test_pytorch_is_cut_where_the_bundle_has_no_more_room() -> None:
    longest = max(len(FakeModel().encode(case)) for case in fake_cases())
    reports = run(FakeModel(max_length=longest + 2))
    assert verdict(reports) == "PASS"
    assert min(len(report.steps) for report in reports) == 2


def test_a_single_case_runs_no_batch() -> None:
    model = FakeModel()
    [report] = compare(model.reference, model, fake_cases()[:1], 8, SilentProgress())
    assert report.batch is None


def test_a_near_tie_is_neither_pass_nor_fail() -> None:
    model = FakeModel(FakeReference(edit_logits=tie), edit_logits=planted("picture", turned))
    reports = run(model)
    assert [report.verdict for report in reports] == ["PASS", "NEAR_TIE", "PASS"]
    fork = reports[1].fork
    assert fork is not None
    assert (fork.step, fork.token_id, fork.reference_token_id) == (2, 8, 7)
    assert reports[1].steps_not_compared == 4
    assert "picture', step 2: token 8; PyTorch has 7; a near tie" in messages(reports)


def test_a_fork_without_a_tie_fails() -> None:
    def change(logits: NDArray[np.float32]) -> None:
        logits[3, 5] = 20.0

    reports = run(FakeModel(edit_logits=planted("two", change)))
    assert [report.verdict for report in reports] == ["PASS", "PASS", "FAIL"]
    assert "case 'two', step 3: token 5; PyTorch has" in messages(reports)
    assert "a fault: gap of its two logits" in messages(reports)


def test_logits_out_of_tolerance_fail_though_all_tokens_are_equal() -> None:
    def change(logits: NDArray[np.float32]) -> None:
        logits += np.float32(5e-4)

    reports = run(FakeModel(edit_logits=planted("text", change)))
    assert reports[0].token_ids == reports[0].reference_token_ids
    assert reports[0].verdict == "FAIL"
    assert "decoder logits, case 'text', step 0: max_abs 0.0005" in messages(reports)


def test_nan_logits_fail() -> None:
    def change(logits: NDArray[np.float32]) -> None:
        logits[1, 3] = np.nan

    reports = run(FakeModel(edit_logits=planted("text", change)))
    assert reports[0].verdict == "FAIL"
    assert "case 'text', step 1: 1 values are NaN or Inf" in messages(reports)


@pytest.mark.parametrize(
    "quantity",
    [
        "vision_encoder",
        "projector",
        "embed_tokens",
        "preprocessing",
    ],
)
def test_a_stage_out_of_tolerance_fails_by_its_name(quantity: str) -> None:
    reports = run(FakeModel(edits={quantity: lambda array: array * np.float32(1.001)}))
    assert reports[1].verdict == "FAIL"
    assert f"{quantity}, case 'picture': max_abs" in messages(reports)
    assert {finding.check for finding in reports[1].findings} == {quantity}


@pytest.mark.parametrize("method", ["vision_encoder", "projector", "embed_tokens"])
def test_nan_in_a_graph_fails(method: str) -> None:
    reports = run(FakeModel(edits={method: lambda array: array * np.nan}))
    assert "values are NaN or Inf; expected finite ones" in messages(reports)
    assert reports[1].verdict == "FAIL"


def test_nan_that_only_the_bundles_own_pixels_cause_fails() -> None:
    def brighter(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return pixels + np.float32(1.0)

    def fragile(features: NDArray[np.float32]) -> NDArray[np.float32]:
        # The fake's features are 100 * pixel + 1, and PyTorch's pixels are at most 1.
        return np.where(features > 101, np.float32(np.nan), features)

    reports = run(FakeModel(edits={"preprocessing": brighter, "vision_encoder": fragile}))
    assert "vision_encoder, case 'picture', end to end: 48 values are NaN" in messages(reports)


@pytest.mark.parametrize("method", ["preprocessing", "vision_encoder", "projector"])
def test_a_wrong_shape_fails_with_both_shapes_and_ends_the_case(method: str) -> None:
    reports = run(FakeModel(edits={method: lambda array: array[..., :-1]}))
    text, picture, two = reports
    assert text.verdict == "PASS"
    assert text.batch is None
    assert picture.verdict == two.verdict == "FAIL"
    assert picture.steps == ()
    assert "; PyTorch has [1, " in messages((picture,))
    assert "decoder, case 'picture': not run" in messages((picture,))


def test_preprocessing_must_be_exact() -> None:
    def one_bit(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.nextafter(pixels, np.float32(2))

    reports = run(FakeModel(edits={"preprocessing": one_bit}))
    assert "preprocessing, case 'picture': max_abs" in messages(reports)
    assert "tolerance 0" in messages(reports)


def test_other_prompt_tokens_fail_with_the_first_difference() -> None:
    def encode(ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([ids[:2], ids[3:]])

    reports = run(FakeModel(edits={"encode": encode}))
    assert not reports[0].prompt_tokens_equal
    assert "prompt, case 'text': " in messages(reports)
    assert "from token 2 on" in messages(reports)


def test_an_answer_that_ends_early_fails() -> None:
    reports = run(FakeModel(edits={"logits": lambda logits: logits[:4]}))
    assert "4 tokens; PyTorch has 7, the first 4 equal" in messages(reports)


def test_a_sampler_that_is_not_greedy_fails() -> None:
    reports = run(FakeModel(edit_tokens=lambda ids: [3, *ids[1:]]))
    assert "chose token 3; its own logits prefer" in messages(reports)


def test_a_batch_that_changes_an_answer_fails() -> None:
    def change(logits: NDArray[np.float32]) -> None:
        logits[2, 5] = 30.0

    reports = run(FakeModel(edit_batch=planted("picture", change)))
    batches = [report.batch for report in reports]
    assert [batch.verdict for batch in batches if batch] == ["PASS", "FAIL", "PASS"]
    assert reports[1].verdict == "FAIL"
    assert reports[1].token_ids == reports[1].reference_token_ids
    assert "decoder in a batch, case 'picture', step 2: token 5; the same case alone has" in (
        messages(reports)
    )


def test_a_batch_that_turns_a_near_tie_is_a_near_tie() -> None:
    model = FakeModel(FakeReference(edit_logits=tie), edit_batch=planted("two", turned))
    reports = run(model)
    assert [report.verdict for report in reports] == ["PASS", "PASS", "NEAR_TIE"]
    assert reports[2].fork is None
    assert reports[2].batch is not None
    assert reports[2].batch.fork is not None
