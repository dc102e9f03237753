"""Compares two greedy answers step by step, and judges where they part: pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.api.parity_measure import compare_arrays, fault_of, limits_of
from vlmport.api.parity_report import Finding, Fork, StepCheck
from vlmport.api.tolerances import near_tie_margin, tolerance_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.api.parity_report import CheckName, Comparison
    from vlmport.api.tolerances import Tolerance

__all__ = [
    "ERROR_BIN_EDGES",
    "Answer",
    "AnswerComparison",
    "comparable_steps",
    "compare_answers",
]

# Four bins a decade from far below float32's resolution of a logit to plain nonsense.
ERROR_BIN_EDGES = tuple(float(edge) for edge in 10.0 ** np.arange(-9, 1.01, 0.25))


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A greedy answer.

    Attributes:
        token_ids: generated tokens, the end-of-sequence token included if it came.
        logits: float32 [generated_tokens, vocab_size], from which each token was chosen.
        text: decoded, without special tokens.
    """

    token_ids: tuple[int, ...]
    logits: NDArray[np.float32]
    text: str


@dataclass(frozen=True, slots=True)
class AnswerComparison:
    """Two answers beside each other.

    Attributes:
        steps: the comparable ones: those up to and with a fork.
        steps_not_compared: the others of the longer answer.
        fork: where the tokens part, or None.
        error_counts: how many logits differ by how much, in the bins of `ERROR_BIN_EDGES`.
        logits_limit: largest max_abs of a step that passes; None if it is not known.
        findings: all that is not PASS.
    """

    steps: tuple[StepCheck, ...]
    steps_not_compared: int
    fork: Fork | None
    error_counts: tuple[int, ...]
    logits_limit: float | None
    findings: tuple[Finding, ...]


def comparable_steps(found: Answer, reference: Answer) -> int:
    """Steps that both answers computed after the same tokens: those up to and with a fork."""
    equal = _common_prefix(found.token_ids, reference.token_ids)
    tokens = min(len(found.token_ids), len(reference.token_ids))
    return min(equal + 1, tokens, len(found.logits), len(reference.logits))


def compare_answers(
    found: Answer,
    reference: Answer,
    precision: str,
    *,
    check: CheckName,
    subject: str,
    other: str,
    rounding: Comparison | None = None,
) -> AnswerComparison:
    """Compares two greedy answers step by step, up to and with the step at which they fork.

    Args:
        found: the answer under test.
        reference: what it is compared with.
        precision: row of the tolerance table.
        check: what findings about tokens are filed under.
        subject: beginning of the messages: graph and case.
        other: name of the reference's side.
        rounding: PyTorch's logits in `precision` beside those in float32.
    """
    equal = _common_prefix(found.token_ids, reference.token_ids)
    shorter, longer = sorted((len(found.token_ids), len(reference.token_ids)))
    comparable = comparable_steps(found, reference)
    judge = _Judge(tolerance_for("logits", precision), rounding, other)
    steps = tuple(_step(found, reference, step) for step in range(comparable))
    findings = _row_findings(found, reference, check, subject, other)
    findings += _logit_findings(steps, judge, check, subject)
    findings += _choice_findings(found, comparable, check, subject)
    fork = _fork(found, reference, steps, equal, judge) if equal < shorter else None
    if fork is not None:
        findings.append(_fork_finding(fork, check, subject, other))
    elif shorter != longer:
        lengths = f"{len(found.token_ids)} tokens; {other} has {len(reference.token_ids)}"
        message = f"{subject}: {lengths}, the first {shorter} equal; expected to end alike"
        findings.append(Finding("FAIL", _tokens(check), message))
    elif found.text.strip() != reference.text.strip():
        message = f"{subject}: text {found.text!r}; {other} has {reference.text!r}, tokens equal"
        findings.append(Finding("FAIL", _tokens(check), message))
    counts = _error_counts(found.logits, reference.logits, comparable)
    return AnswerComparison(
        steps, longer - comparable, fork, counts, judge.limit(steps), tuple(findings)
    )


@dataclass(frozen=True, slots=True)
class _Judge:
    """What one answer's logits are held against."""

    tolerance: Tolerance
    rounding: Comparison | None
    other: str

    def fault(self, step: StepCheck) -> str | None:
        return fault_of(step.comparison, self.tolerance, self.other, self.rounding)

    def limit(self, steps: Sequence[StepCheck]) -> float | None:
        """The same for all steps: neither an absolute nor a rounding basis depends on them."""
        return limits_of(steps[0].comparison, self.tolerance, self.rounding)[0] if steps else None


def _tokens(check: CheckName) -> CheckName:
    return "greedy_tokens" if check == "logits" else check


def _common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _step(found: Answer, reference: Answer, step: int) -> StepCheck:
    ours, theirs = found.logits[step], reference.logits[step]
    comparison = compare_arrays(ours, theirs)
    is_comparable = comparison.max_abs is not None and ours.size > 0
    return StepCheck(
        step=step,
        token_id=found.token_ids[step],
        reference_token_id=reference.token_ids[step],
        comparison=comparison,
        argmax_equal=bool(ours.argmax() == theirs.argmax()) if is_comparable else None,
        gap=_top_gap(theirs),
    )


def _top_gap(logits: NDArray[np.float32]) -> float | None:
    finite = logits[np.isfinite(logits)]
    if finite.size < 2:
        return None
    second, first = np.partition(finite, -2)[-2:]
    return float(first) - float(second)


def _row_findings(
    found: Answer, reference: Answer, check: CheckName, subject: str, other: str
) -> list[Finding]:
    """An answer must come with one row of logits a token, or steps would go unchecked."""
    findings = []
    for side, answer in (("the bundle", found), (other, reference)):
        if len(answer.logits) != len(answer.token_ids):
            message = (
                f"{subject}: {side} gave {len(answer.logits)} rows of logits for "
                f"{len(answer.token_ids)} tokens; expected one a token"
            )
            findings.append(Finding("FAIL", check, message))
    return findings


def _logit_findings(
    steps: Sequence[StepCheck], judge: _Judge, check: CheckName, subject: str
) -> list[Finding]:
    """One finding for the first faulty step, which also tells of the others."""
    faults = [(step.step, judge.fault(step)) for step in steps]
    faulty = [(step, fault) for step, fault in faults if fault is not None]
    if not faulty:
        return []
    step, fault = faulty[0]
    more = f" (and {len(faulty) - 1} more of {len(steps)} steps)" if len(faulty) > 1 else ""
    return [Finding("FAIL", check, f"{subject}, step {step}: {fault}{more}")]


def _choice_findings(
    found: Answer, comparable: int, check: CheckName, subject: str
) -> list[Finding]:
    """Greedy decoding must choose a largest logit; else the sampler is at fault, not a graph."""
    for step in range(comparable):
        logits, token_id = found.logits[step], found.token_ids[step]
        if not logits.size or not np.isfinite(logits).all():
            continue
        best = int(logits.argmax())
        if not 0 <= token_id < logits.size or logits[token_id] < logits[best]:
            message = (
                f"{subject}, step {step}: chose token {token_id}; its own logits prefer {best}"
            )
            return [Finding("FAIL", _tokens(check), message)]
    return []


def _fork(
    found: Answer, reference: Answer, steps: Sequence[StepCheck], at: int, judge: _Judge
) -> Fork:
    ours, theirs = found.token_ids[at], reference.token_ids[at]
    margin, gap, is_near_tie = near_tie_margin(judge.limit(steps) or 0.0), None, False
    if at < len(steps):
        logits = reference.logits[at]
        if 0 <= ours < logits.size and 0 <= theirs < logits.size:
            difference = float(logits[theirs]) - float(logits[ours])
            gap = difference if np.isfinite(difference) else None
        is_within = judge.fault(steps[at]) is None
        is_near_tie = is_within and gap is not None and abs(gap) <= margin
    return Fork(at, ours, theirs, gap, margin, is_near_tie)


def _fork_finding(fork: Fork, check: CheckName, subject: str, other: str) -> Finding:
    gap = "unknown" if fork.gap is None else f"{fork.gap:.3g}"
    kind = "a near tie" if fork.is_near_tie else "a fault"
    message = (
        f"{subject}, step {fork.step}: token {fork.token_id}; {other} has "
        f"{fork.reference_token_id}; {kind}: gap of its two logits {gap}, margin {fork.margin:.3g}"
    )
    return Finding("NEAR_TIE" if fork.is_near_tie else "FAIL", _tokens(check), message)


def _error_counts(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], steps: int
) -> tuple[int, ...]:
    counts = np.zeros(len(ERROR_BIN_EDGES) + 1, np.int64)
    for found, reference in zip(ours[:steps], theirs[:steps], strict=True):
        if found.shape == reference.shape:
            error = np.abs(found.astype(np.float64) - reference.astype(np.float64))
            bins = np.digitize(error[np.isfinite(error)], ERROR_BIN_EDGES)
            counts += np.bincount(bins, minlength=len(counts))
    return tuple(int(count) for count in counts)
