"""Asks a PyTorch reference and a bundle the same cases and reports what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vlmport.api.parity_answers import Answer, AnswerComparison, compare_answers
from vlmport.api.parity_measure import compare_arrays, fault_of, limits_of
from vlmport.api.parity_report import (
    BatchCheck,
    CaseReport,
    Comparison,
    Finding,
    QuantityCheck,
    worst_verdict,
)
from vlmport.api.tolerances import tolerance_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.api.builtin_cases import Case
    from vlmport.api.parity_model import ComparedModel, PromptTokens
    from vlmport.api.parity_report import CheckName
    from vlmport.api.progress import Progress
    from vlmport.export.reference import Reference

__all__ = ["compare"]

_NO_ANSWER = Answer((), np.zeros((0, 0), np.float32), "")
_NOTHING_COMPARED = AnswerComparison((), 0, None, (), ())


def compare(
    reference: Reference,
    model: ComparedModel,
    cases: Sequence[Case],
    max_new_tokens: int,
    progress: Progress,
    *,
    precision: str = "float32",
) -> tuple[CaseReport, ...]:
    """Compares a bundle with a reference, case by case, and then all cases in one batch.

    Args:
        reference: the PyTorch model.
        model: the opened bundle.
        cases: chats that the bundle has room for.
        max_new_tokens: most tokens of an answer; an end-of-sequence token ends it before.
        progress: is told of each finished case.
        precision: which rows of the tolerance table apply.
    """
    progress.start("comparing answers", len(cases) + 1)
    reports: list[CaseReport] = []
    answers: list[Answer | None] = []
    for case in cases:
        report, answer = _compare_case(reference, model, case, max_new_tokens, precision)
        reports.append(report)
        answers.append(answer)
        progress.advance(1)
    alone = {index: answer for index, answer in enumerate(answers) if answer is not None}
    if len(alone) > 1:
        batch = [(cases[index], answer) for index, answer in alone.items()]
        checks = _compare_batch(model, batch, max_new_tokens, precision)
        for index, (check, findings) in zip(alone, checks, strict=True):
            reports[index] = _with_batch(reports[index], check, findings)
    progress.advance(1)
    progress.finish()
    return tuple(reports)


def _compare_case(
    reference: Reference, model: ComparedModel, case: Case, max_new_tokens: int, precision: str
) -> tuple[CaseReport, Answer | None]:
    prompt = model.encode(case.messages)
    checks, findings = _compare_image_stages(reference, model, case, precision)
    if any(_has_wrong_shape(check) for check in checks):
        message = f"decoder, case {case.name!r}: not run, as a shape before it is wrong"
        findings.append(Finding("FAIL", "logits", message))
        return _case_report(case, prompt, checks, findings), None
    found = _answer_alone(model, case, max_new_tokens)
    limit = min(max_new_tokens, model.max_length - prompt.length)
    expected = reference.greedy(case.messages, case.rgb_images(), limit)
    findings += _prompt_findings(case, prompt.text_ids, expected.prompt_ids)
    if expected.prompt_ids.size:
        check, more = _compare_embedding(reference, model, case, expected.prompt_ids, precision)
        checks.append(check)
        findings += more
    theirs = Answer(tuple(map(int, expected.token_ids)), expected.logits, expected.text)
    subject = f"decoder logits, case {case.name!r}"
    answers = compare_answers(
        found, theirs, precision, check="logits", subject=subject, other="PyTorch"
    )
    findings += answers.findings
    return _case_report(case, prompt, checks, findings, found, theirs, answers), found


def _compare_image_stages(
    reference: Reference, model: ComparedModel, case: Case, precision: str
) -> tuple[list[QuantityCheck], list[Finding]]:
    """Each graph on PyTorch's input of it; beside that, the bundle's own chain from the picture."""
    if not case.images:
        return [], []
    own_pixels = model.preprocess(case.images)
    pixels = reference.pixel_values(case.rgb_images())
    features = reference.vision_features(pixels)
    projected = reference.image_features(features)
    pixel_check = compare_arrays(own_pixels, pixels)
    feature_check = compare_arrays(model.vision_features(pixels), features)
    projected_check = compare_arrays(model.image_features(features), projected)
    feature_chain = projected_chain = None
    # A graph refuses input of a wrong shape, so the chain ends where a shape is wrong.
    if own_pixels.shape == pixels.shape:
        own_features = model.vision_features(own_pixels)
        feature_chain = compare_arrays(own_features, features)
        if own_features.shape == features.shape:
            projected_chain = compare_arrays(model.image_features(own_features), projected)
    stages: list[tuple[CheckName, Comparison, Comparison | None]] = [
        ("preprocessing", pixel_check, None),
        ("vision_encoder", feature_check, feature_chain),
        ("projector", projected_check, projected_chain),
    ]
    checks, findings = [], []
    for quantity, comparison, chain in stages:
        check, faults = _judge(quantity, case, comparison, chain, precision)
        checks.append(check)
        findings += faults
    return checks, findings


def _compare_embedding(
    reference: Reference,
    model: ComparedModel,
    case: Case,
    prompt_ids: NDArray[np.int64],
    precision: str,
) -> tuple[QuantityCheck, list[Finding]]:
    ids = prompt_ids[None]
    comparison = compare_arrays(model.inputs_embeds(ids), reference.inputs_embeds(ids))
    return _judge("embed_tokens", case, comparison, None, precision)


def _judge(
    quantity: CheckName,
    case: Case,
    comparison: Comparison,
    end_to_end: Comparison | None,
    precision: str,
) -> tuple[QuantityCheck, list[Finding]]:
    tolerance = tolerance_for(quantity, precision)
    subject = f"{quantity}, case {case.name!r}"
    findings = []
    if fault := fault_of(comparison, tolerance, "PyTorch"):
        findings.append(Finding("FAIL", quantity, f"{subject}: {fault}"))
    elif end_to_end and (fault := fault_of(end_to_end, None, "PyTorch")):
        findings.append(Finding("FAIL", quantity, f"{subject}, end to end: {fault}"))
    verdict = worst_verdict(finding.verdict for finding in findings)
    limits = limits_of(comparison, tolerance)
    return QuantityCheck(quantity, comparison, end_to_end, *limits, verdict), findings


def _has_wrong_shape(check: QuantityCheck) -> bool:
    both = (check.comparison, check.end_to_end)
    return any(one is not None and one.shape != one.reference_shape for one in both)


def _prompt_findings(
    case: Case, ours: NDArray[np.int64], theirs: NDArray[np.int64]
) -> list[Finding]:
    if np.array_equal(ours, theirs):
        return []
    pairs = zip(ours.tolist(), theirs.tolist(), strict=False)
    shorter = min(len(ours), len(theirs))
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)
    message = (
        f"prompt, case {case.name!r}: {len(ours)} text tokens, from token {at} on "
        f"{ours[at : at + 4].tolist()}; PyTorch has {len(theirs)}, {theirs[at : at + 4].tolist()}"
    )
    return [Finding("FAIL", "prompt_tokens", message)]


def _answer_alone(model: ComparedModel, case: Case, max_new_tokens: int) -> Answer:
    rows: list[NDArray[np.float32]] = []
    # A copy: a runtime may write every step's logits into the same buffer.
    [answer] = model.greedy([case], max_new_tokens, lambda step: rows.append(step[0].copy()))
    return Answer(answer.token_ids, _stacked(rows), answer.text)


def _compare_batch(
    model: ComparedModel,
    alone: Sequence[tuple[Case, Answer]],
    max_new_tokens: int,
    precision: str,
) -> list[tuple[BatchCheck, tuple[Finding, ...]]]:
    steps: list[NDArray[np.float32]] = []
    cases = [case for case, _ in alone]
    batched = model.greedy(cases, max_new_tokens, lambda step: steps.append(step.copy()))
    results = []
    for row, ((case, answer), found) in enumerate(zip(alone, batched, strict=True)):
        # Steps after a row's end hold values without meaning.
        rows = [step[row] for step in steps[: len(found.token_ids)]]
        result = compare_answers(
            Answer(found.token_ids, _stacked(rows), found.text),
            answer,
            precision,
            check="batch",
            subject=f"decoder in a batch, case {case.name!r}",
            other="the same case alone",
        )
        errors = [step.comparison.max_abs for step in result.steps]
        known = [error for error in errors if error is not None]
        verdict = worst_verdict(finding.verdict for finding in result.findings)
        check = BatchCheck(found.token_ids, max(known, default=None), result.fork, verdict)
        results.append((check, result.findings))
    return results


def _stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def _case_report(
    case: Case,
    prompt: PromptTokens,
    checks: Sequence[QuantityCheck],
    findings: Sequence[Finding],
    found: Answer = _NO_ANSWER,
    expected: Answer = _NO_ANSWER,
    answers: AnswerComparison = _NOTHING_COMPARED,
) -> CaseReport:
    return CaseReport(
        name=case.name,
        prompt=case.prompt,
        images=case.image_names(),
        prompt_tokens=prompt.length,
        prompt_tokens_equal=all(finding.check != "prompt_tokens" for finding in findings),
        checks=tuple(checks),
        steps=answers.steps,
        steps_not_compared=answers.steps_not_compared,
        fork=answers.fork,
        token_ids=found.token_ids,
        reference_token_ids=expected.token_ids,
        text=found.text,
        reference_text=expected.text,
        error_counts=answers.error_counts,
        batch=None,
        findings=tuple(findings),
        verdict=worst_verdict(finding.verdict for finding in findings),
    )


def _with_batch(report: CaseReport, check: BatchCheck, findings: Sequence[Finding]) -> CaseReport:
    verdict = worst_verdict((report.verdict, check.verdict))
    return replace(report, batch=check, findings=(*report.findings, *findings), verdict=verdict)
