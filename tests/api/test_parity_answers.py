from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from vlmport.api.parity_answers import ERROR_BIN_EDGES, Answer, AnswerComparison, compare_answers


def answer(logits: Sequence[Sequence[float]], token_ids: Sequence[int] | None = None) -> Answer:
    rows = np.array(logits, np.float32)
    ids = [int(row.argmax()) for row in rows] if token_ids is None else token_ids
    return Answer(tuple(ids), rows, " ".join(map(str, ids)))


def compared(found: Answer, reference: Answer) -> AnswerComparison:
    return compare_answers(
        found, reference, "float32", check="logits", subject="decoder", other="PyTorch"
    )


def test_equal_answers_have_no_findings() -> None:
    one = answer([[1, 3, 2], [5, 0, 0]])
    result = compared(one, one)
    assert result.findings == ()
    assert result.fork is None
    assert [step.gap for step in result.steps] == [1.0, 5.0]
    assert [step.argmax_equal for step in result.steps] == [True, True]
    assert result.error_counts[0] == sum(result.error_counts) == 6


def test_a_fork_within_the_margin_is_a_near_tie() -> None:
    reference = answer([[1, 3, 0], [2.0, 2.0001, 0], [0, 0, 9]])
    found = answer([[1, 3, 0], [2.00008, 2.00003, 0], [7, 0, 0]])
    result = compared(found, reference)
    assert [finding.verdict for finding in result.findings] == ["NEAR_TIE"]
    assert result.fork is not None
    assert (result.fork.step, result.fork.token_id, result.fork.reference_token_id) == (1, 0, 1)
    assert result.fork.gap == pytest.approx(1e-4, rel=0.01)
    assert (len(result.steps), result.steps_not_compared) == (2, 1)


def test_a_fork_with_a_wide_gap_is_a_fault() -> None:
    result = compared(answer([[1, 3, 0], [9, 2, 0]]), answer([[1, 3, 0], [1, 2, 0]]))
    assert result.fork is not None
    assert not result.fork.is_near_tie
    assert {finding.verdict for finding in result.findings} == {"FAIL"}
    assert {finding.check for finding in result.findings} == {"logits", "greedy_tokens"}


def test_a_fork_at_a_tie_is_a_fault_if_the_logits_are_out_of_tolerance() -> None:
    result = compared(answer([[5.0, 2.0, 0]]), answer([[2.0, 2.0001, 0]]))
    assert result.fork is not None
    assert not result.fork.is_near_tie
    assert all(finding.verdict == "FAIL" for finding in result.findings)


def test_logits_out_of_tolerance_fail_though_the_tokens_are_equal() -> None:
    result = compared(answer([[0, 3.0], [0, 4.001]]), answer([[0, 3.0], [0, 4.0]]))
    [finding] = result.findings
    assert (finding.verdict, finding.check) == ("FAIL", "logits")
    assert finding.message == "decoder, step 1: max_abs 0.001; tolerance 0.0001"


def test_further_faulty_steps_are_counted_in_one_finding() -> None:
    result = compared(answer([[0, 4.0]] * 3), answer([[0, 3.0]] * 3))
    [finding] = result.findings
    assert finding.message.endswith("(and 2 more of 3 steps)")


def test_a_token_that_its_own_logits_do_not_prefer_is_a_fault_of_the_choice() -> None:
    rows = [[1.0, 3.0, 2.0]]
    result = compared(answer(rows, token_ids=[2]), answer(rows))
    assert "chose token 2; its own logits prefer 1" in result.findings[0].message
    assert result.findings[0].check == "greedy_tokens"


def test_a_wrong_choice_at_a_tie_of_others_is_no_near_tie() -> None:
    rows = [[3.0, 3.0, 1.0]]
    result = compared(answer(rows, token_ids=[2]), answer(rows))
    assert result.fork is not None
    assert result.fork.gap == 2.0
    assert not result.fork.is_near_tie


def test_answers_of_different_lengths_fail() -> None:
    rows = [[1.0, 3.0], [4.0, 0.0]]
    result = compared(answer(rows[:1]), answer(rows))
    [finding] = result.findings
    assert finding.message == (
        "decoder: 1 tokens; PyTorch has 2, the first 1 equal; expected to end alike"
    )
    assert (len(result.steps), result.steps_not_compared) == (1, 1)


def test_nan_logits_fail_with_their_own_reason() -> None:
    result = compared(answer([[np.nan, 3.0]], token_ids=[1]), answer([[1.0, 3.0]]))
    [finding] = result.findings
    assert finding.message == "decoder, step 0: 1 values are NaN or Inf; expected finite ones"
    assert result.steps[0].argmax_equal is None


def test_a_vocabulary_of_another_size_fails_with_both_shapes() -> None:
    result = compared(answer([[1.0, 3.0, 0.0]]), answer([[1.0, 3.0]]))
    assert "shape [3]; PyTorch has [2]" in result.findings[0].message


def test_missing_rows_of_logits_fail() -> None:
    rows = [[1.0, 3.0], [4.0, 0.0]]
    result = compared(answer(rows[:1], token_ids=[1, 0]), answer(rows))
    assert "1 rows of logits for 2 tokens" in result.findings[0].message
    assert len(result.steps) == 1


def test_a_fork_beyond_the_logits_is_a_fault_with_an_unknown_gap() -> None:
    rows = [[1.0, 3.0], [4.0, 0.0]]
    result = compared(answer(rows[:1], token_ids=[1, 1]), answer(rows))
    assert result.fork is not None
    assert result.fork.gap is None
    assert result.findings[-1].verdict == "FAIL"


def test_empty_answers_are_equal() -> None:
    nothing = Answer((), np.zeros((0, 0), np.float32), "")
    result = compared(nothing, nothing)
    assert result.findings == ()
    assert result.steps == ()


def test_equal_tokens_with_another_text_fail() -> None:
    one = answer([[1.0, 3.0]])
    other = Answer(one.token_ids, one.logits, "something else")
    assert "text '1'; PyTorch has 'something else'" in compared(one, other).findings[0].message


def test_error_counts_fall_into_their_bins() -> None:
    result = compared(answer([[0.0, 5.0, 2.0]]), answer([[0.0, 5.5, 1.0]]))
    assert len(result.error_counts) == len(ERROR_BIN_EDGES) + 1
    assert sum(result.error_counts) == 3
    at = next(index for index, edge in enumerate(ERROR_BIN_EDGES) if edge > 0.5)
    assert result.error_counts[at] == 1
