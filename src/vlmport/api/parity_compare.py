"""Asks a PyTorch reference and a bundle the same cases and reports what differs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from vlmport.api.parity_answers import Answer, AnswerComparison, compare_answers
from vlmport.api.parity_measure import compare_arrays, fault_of, limits_of
from vlmport.api.parity_report import (
    BatchCheck,
    CaseReport,
    Comparison,
    Finding,
    QuantityCheck,
    RoundingCheck,
    worst_verdict,
)
from vlmport.api.parity_rounding import answer_distance, rounding_findings, rounding_of
from vlmport.api.tolerances import tolerance_for
from vlmport.export.reference import IMAGE_TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from vlmport.api.builtin_cases import Case
    from vlmport.api.parity_model import ComparedModel
    from vlmport.api.parity_report import CheckName
    from vlmport.api.progress import Progress
    from vlmport.export.reference import Reference, ReferenceAnswer

__all__ = ["compare"]

_NO_ANSWER = Answer((), np.zeros((0, 0), np.float32), "")
_NOTHING_COMPARED = AnswerComparison((), 0, None, (), None, ())
_Pairs = tuple[tuple[NDArray[Any], NDArray[Any]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """What one step from a picture to its features gave, the bundle's array beside PyTorch's.

    Attributes:
        pairs: both sides fed with PyTorch's input of this step.
        chain: each side fed with its own outputs from the picture on; empty where it would be the
            same, None where a shape before it is wrong.
        bundle_float32: the bundle beside PyTorch in float32, both fed with PyTorch's input; empty
            where the bundle computes in float32.
        pytorch_float32: PyTorch in the bundle's precision beside PyTorch in float32, likewise.
    """

    pairs: _Pairs
    chain: _Pairs | None
    bundle_float32: _Pairs = ()
    pytorch_float32: _Pairs = ()


@dataclass(frozen=True, slots=True)
class _Sides:
    """What is compared.

    Attributes:
        reference: the PyTorch model, in the bundle's precision.
        model: the opened bundle.
        precision: which rows of the tolerance table apply.
        float32: the PyTorch model in float32, if that is not the bundle's precision.
    """

    reference: Reference
    model: ComparedModel
    precision: str
    float32: Reference | None


def compare(
    reference: Reference,
    model: ComparedModel,
    cases: Sequence[Case],
    max_new_tokens: int,
    progress: Progress,
    *,
    precision: str = "float32",
    float32: Reference | None = None,
) -> tuple[CaseReport, ...]:
    """Compares a bundle with a reference, case by case, and then all cases in one batch.

    Args:
        reference: the PyTorch model, in the bundle's precision.
        model: the opened bundle.
        cases: chats that the bundle has room for.
        max_new_tokens: most tokens of an answer; an end-of-sequence token ends it before.
        progress: is told of each finished case.
        precision: which rows of the tolerance table apply.
        float32: the PyTorch model in float32; needed where the bundle's precision is another, whose
            tolerances follow from PyTorch's own rounding.
    """
    assert (float32 is None) == (precision == "float32")
    sides = _Sides(reference, model, precision, float32)
    progress.start("comparing answers", len(cases) + 1)
    reports: list[CaseReport] = []
    answers: list[Answer | None] = []
    for case in cases:
        report, answer = _compare_case(sides, case, max_new_tokens)
        reports.append(report)
        answers.append(answer)
        progress.advance(1)
    alone = {index: answer for index, answer in enumerate(answers) if answer is not None}
    if len(alone) > 1:
        batch = [(cases[index], answer) for index, answer in alone.items()]
        roundings = [rounding_of(reports[index].rounding, "logits") for index in alone]
        checks = _compare_batch(sides, batch, roundings, max_new_tokens)
        for index, (check, findings) in zip(alone, checks, strict=True):
            reports[index] = _with_batch(reports[index], check, findings)
    progress.advance(1)
    progress.finish()
    return tuple(reports)


def _compare_case(
    sides: _Sides, case: Case, max_new_tokens: int
) -> tuple[CaseReport, Answer | None]:
    reference, model = sides.reference, sides.model
    prompt = model.encode(case)
    checks, rounding, findings = _compare_image_stages(sides, case)
    if any(_has_wrong_shape(check) for check in checks):
        message = f"decoder, case {case.name!r}: not run, as a shape before it is wrong"
        findings.append(Finding("FAIL", "logits", message))
        return _case_report(case, prompt, checks, rounding, findings), None
    found = _answer_alone(model, case, max_new_tokens)
    limit = min(max_new_tokens, model.max_length - len(prompt))
    expected = reference.greedy(case.messages, case.rgb_images(), limit)
    findings += _prompt_findings(case, prompt, expected.prompt_ids)
    if (expected.prompt_ids != IMAGE_TOKEN).any():
        check, both, more = _compare_embedding(sides, case, expected.prompt_ids)
        checks.append(check)
        rounding += both
        findings += more
    theirs, wide = _answer_of(expected), _NO_ANSWER
    if sides.float32 is not None:
        wide = _answer_of(sides.float32.greedy(case.messages, case.rgb_images(), limit))
        distances = answer_distance(found, wide), answer_distance(theirs, wide)
        rounding.append(RoundingCheck("logits", *distances))
    answers = compare_answers(
        found,
        theirs,
        sides.precision,
        check="logits",
        subject=f"decoder logits, case {case.name!r}",
        other="PyTorch",
        rounding=rounding_of(rounding, "logits"),
    )
    findings += answers.findings
    findings += rounding_findings(rounding, sides.precision, case.name)
    report = _case_report(case, prompt, checks, rounding, findings, found, theirs, answers)
    return replace(report, float32_token_ids=wide.token_ids), found


def _answer_of(answer: ReferenceAnswer) -> Answer:
    return Answer(tuple(map(int, answer.token_ids)), answer.logits, answer.text)


def _compare_image_stages(
    sides: _Sides, case: Case
) -> tuple[list[QuantityCheck], list[RoundingCheck], list[Finding]]:
    """Each graph on PyTorch's input of it; beside that, the bundle's own chain from the picture."""
    if not case.images:
        return [], [], []
    stages = [_image_stages(sides, *pair) for pair in _pictures(case)]
    checks, rounding, findings = [], [], []
    for quantity in stages[0]:
        both = _rounding(quantity, [image[quantity] for image in stages])
        alone = _joined([pair for image in stages for pair in image[quantity].pairs])
        chains = [image[quantity].chain for image in stages]
        known = [pair for chain in chains if chain is not None for pair in chain]
        chain = _joined(known) if None not in chains else None
        check, faults = _judge(sides, quantity, case, alone, chain, both)
        checks.append(check)
        rounding += both
        findings += faults
    return checks, rounding, findings


def _rounding(quantity: CheckName, stages: Sequence[_Stage]) -> list[RoundingCheck]:
    """What rounding did to a stage of all images; nothing where it was not measured."""
    bundle = _joined([pair for stage in stages for pair in stage.bundle_float32])
    pytorch = _joined([pair for stage in stages for pair in stage.pytorch_float32])
    return [RoundingCheck(quantity, bundle, pytorch)] if bundle and pytorch else []


def _pictures(case: Case) -> list[tuple[Path | Image, Image]]:
    return list(zip(case.images, case.rgb_images(), strict=True))


def _image_stages(sides: _Sides, image: Path | Image, rgb: Image) -> dict[CheckName, _Stage]:
    """Preprocessing and the image graphs of one picture."""
    reference, model = sides.reference, sides.model
    ours, theirs = model.image_inputs(image), reference.image_inputs(rgb)
    pairs = _pairs(ours, theirs)
    stages: dict[CheckName, _Stage] = {"preprocessing": _Stage(pairs, ())}
    # A graph refuses input of a wrong shape, so the chain ends where a shape is wrong.
    is_chained = ours.keys() == theirs.keys() and all(a.shape == b.shape for a, b in pairs)
    for graph in model.image_graphs:
        expected = reference.run(graph, theirs)
        found = model.run(graph, theirs)
        alone, wide = _pairs(found, expected), None
        if sides.float32 is not None:
            wide = sides.float32.run(graph, theirs)
        chain = None
        if is_chained:
            own = model.run(graph, ours)
            chain = _pairs(own, expected)
            ours = {**ours, **own}
            is_chained = all(a.shape == b.shape for a, b in chain)
        theirs = {**theirs, **expected}
        beside = (_pairs(found, wide), _pairs(expected, wide)) if wide is not None else ((), ())
        stages[cast("CheckName", graph)] = _Stage(alone, chain, *beside)
    return stages


def _pairs(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> _Pairs:
    """Arrays of the same name; one that a side lacks stands beside an empty one."""
    nothing = np.zeros((0,), np.float32)
    names = sorted({*ours, *theirs})
    return tuple((ours.get(name, nothing), theirs.get(name, nothing)) for name in names)


def _joined(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> Comparison | None:
    """All pairs as one comparison, or that of the first pair whose shapes differ."""
    for ours, theirs in pairs:
        if ours.shape != theirs.shape or len(pairs) == 1:
            return compare_arrays(ours, theirs)
    if not pairs:
        return None
    sides = zip(*pairs, strict=True)
    ours, theirs = (np.concatenate([array.ravel() for array in side]) for side in sides)
    return compare_arrays(ours, theirs)


def _compare_embedding(
    sides: _Sides, case: Case, prompt_ids: NDArray[np.int64]
) -> tuple[QuantityCheck, list[RoundingCheck], list[Finding]]:
    inputs = {"input_ids": prompt_ids[prompt_ids != IMAGE_TOKEN][None]}
    found = sides.model.run("embed_tokens", inputs)
    expected = sides.reference.run("embed_tokens", inputs)
    stage = _Stage(_pairs(found, expected), None)
    if sides.float32 is not None:
        wide = sides.float32.run("embed_tokens", inputs)
        stage = replace(
            stage, bundle_float32=_pairs(found, wide), pytorch_float32=_pairs(expected, wide)
        )
    both = _rounding("embed_tokens", [stage])
    check, findings = _judge(sides, "embed_tokens", case, _joined(stage.pairs), None, both)
    return check, both, findings


def _judge(
    sides: _Sides,
    quantity: CheckName,
    case: Case,
    comparison: Comparison | None,
    end_to_end: Comparison | None,
    rounding: Sequence[RoundingCheck],
) -> tuple[QuantityCheck, list[Finding]]:
    assert comparison is not None  # every graph has an output
    tolerance = tolerance_for(quantity, sides.precision)
    own = rounding_of(rounding, quantity)
    subject = f"{quantity}, case {case.name!r}"
    findings = []
    if fault := fault_of(comparison, tolerance, "PyTorch", own):
        findings.append(Finding("FAIL", quantity, f"{subject}: {fault}"))
    elif end_to_end and (fault := fault_of(end_to_end, None, "PyTorch")):
        findings.append(Finding("FAIL", quantity, f"{subject}, end to end: {fault}"))
    verdict = worst_verdict(finding.verdict for finding in findings)
    limits = limits_of(comparison, tolerance, own)
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
        f"prompt, case {case.name!r}: {len(ours)} tokens, from token {at} on "
        f"{ours[at : at + 4].tolist()}; PyTorch has {len(theirs)}, {theirs[at : at + 4].tolist()}"
    )
    return [Finding("FAIL", "prompt_tokens", message)]


def _answer_alone(model: ComparedModel, case: Case, max_new_tokens: int) -> Answer:
    rows: list[NDArray[np.float32]] = []
    # A copy: a runtime may write every step's logits into the same buffer.
    [answer] = model.greedy([case], max_new_tokens, lambda step: rows.append(step[0].copy()))
    return Answer(answer.token_ids, _stacked(rows), answer.text)


def _compare_batch(
    sides: _Sides,
    alone: Sequence[tuple[Case, Answer]],
    roundings: Sequence[Comparison | None],
    max_new_tokens: int,
) -> list[tuple[BatchCheck, tuple[Finding, ...]]]:
    steps: list[NDArray[np.float32]] = []
    cases = [case for case, _ in alone]
    batched = sides.model.greedy(cases, max_new_tokens, lambda step: steps.append(step.copy()))
    results = []
    for row, ((case, answer), found) in enumerate(zip(alone, batched, strict=True)):
        # Steps after a row's end hold values without meaning.
        rows = [step[row] for step in steps[: len(found.token_ids)]]
        result = compare_answers(
            Answer(found.token_ids, _stacked(rows), found.text),
            answer,
            sides.precision,
            check="batch",
            subject=f"decoder in a batch, case {case.name!r}",
            other="the same case alone",
            rounding=roundings[row],
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
    prompt: NDArray[np.int64],
    checks: Sequence[QuantityCheck],
    rounding: Sequence[RoundingCheck],
    findings: Sequence[Finding],
    found: Answer = _NO_ANSWER,
    expected: Answer = _NO_ANSWER,
    answers: AnswerComparison = _NOTHING_COMPARED,
) -> CaseReport:
    return CaseReport(
        name=case.name,
        prompt=case.prompt,
        images=case.image_names(),
        prompt_tokens=len(prompt),
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
        logits_limit=answers.logits_limit,
        rounding=tuple(rounding),
        float32_token_ids=(),
        batch=None,
        findings=tuple(findings),
        verdict=worst_verdict(finding.verdict for finding in findings),
    )


def _with_batch(report: CaseReport, check: BatchCheck, findings: Sequence[Finding]) -> CaseReport:
    verdict = worst_verdict((report.verdict, check.verdict))
    return replace(report, batch=check, findings=(*report.findings, *findings), verdict=verdict)
