"""A parity report in one row a check, for the terminal and the HTML page alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.parity_report import worst_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlmport.api.parity_report import CheckName, Comparison, ParityReport, Verdict

__all__ = [
    "RoundingRow",
    "SummaryRow",
    "answer_totals",
    "shown",
    "summarize",
    "summarize_rounding",
]

_STAGES: tuple[CheckName, ...] = ("preprocessing", "vision_encoder", "projector", "embed_tokens")


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One check over all cases, in words and numbers that are ready to be shown.

    Attributes:
        check: what was compared.
        max_abs: of the worst case.
        limit: that it was held against.
        mean_abs: of that case.
        cosine: the lowest of all cases.
        case: the worst case.
        ratio: max_abs / limit; None if the limit is zero or a number is missing.
        verdict: the worst of all cases.
    """

    check: CheckName
    max_abs: str
    limit: str
    mean_abs: str
    cosine: str
    case: str
    ratio: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RoundingRow:
    """Distances to PyTorch in float32 over all cases, ready to be shown.

    Attributes:
        check: what was compared.
        bundle: the bundle's largest difference.
        pytorch: that of PyTorch in the bundle's precision.
        bundle_mean: the bundle's mean difference, of the worst case.
        pytorch_mean: PyTorch's, likewise.
    """

    check: CheckName
    bundle: str
    pytorch: str
    bundle_mean: str
    pytorch_mean: str


@dataclass(frozen=True, slots=True)
class _Measured:
    case: str
    comparison: Comparison
    limit: float | None

    @property
    def badness(self) -> float:
        """How far along to its limit; what has no number is worst."""
        error = self.comparison.max_abs
        if error is None:
            return float("inf")
        return error / self.limit if self.limit else error


def summarize(report: ParityReport) -> list[SummaryRow]:
    """The numeric checks that ran, in the order of the data's way through the model."""
    rows = []
    for stage in _STAGES:
        measured = [
            _Measured(case.name, check.comparison, check.max_abs_limit)
            for case in report.cases
            for check in case.checks
            if check.quantity == stage
        ]
        rows += _row(report, stage, measured)
    measured = [
        _Measured(case.name, step.comparison, case.logits_limit)
        for case in report.cases
        for step in case.steps
    ]
    return [*rows, *_row(report, "logits", measured)]


def summarize_rounding(report: ParityReport) -> list[RoundingRow]:
    """What half precision does to each stage; nothing where the bundle computes in float32."""
    checks = [check for case in report.cases for check in case.rounding]
    rows = []
    for quantity in (*_STAGES, "logits"):
        sides = [
            [getattr(check, side) for check in checks if check.quantity == quantity]
            for side in ("bundle", "pytorch")
        ]
        if sides[0]:
            largest = [_largest(c.max_abs for c in side) for side in sides]
            means = [_largest(c.mean_abs for c in side) for side in sides]
            rows.append(RoundingRow(quantity, *largest, *means))
    return rows


def answer_totals(report: ParityReport) -> list[tuple[CheckName, str, Verdict]]:
    """The checks of tokens: (check, how many were equal, verdict)."""
    cases = report.cases
    prompts = sum(case.prompt_tokens_equal for case in cases)
    pairs = [(case.token_ids, case.reference_token_ids) for case in cases]
    equal = sum(
        case.fork.step if case.fork else min(len(case.token_ids), len(case.reference_token_ids))
        for case in cases
    )
    longest = sum(max(len(ours), len(theirs)) for ours, theirs in pairs)
    batched = [(case.batch.token_ids, case.token_ids) for case in cases if case.batch]
    same = sum(ours == theirs for ours, theirs in batched)
    batch = f"{same} of {len(batched)} answers as alone" if batched else "not run: one case only"
    tokens = f"all {longest} tokens equal"
    if equal < longest:
        tokens = f"{equal} of {longest} tokens equal before the answers part"
    if any(case.float32_token_ids for case in cases):
        tokens += f"; {_as_in_float32(report)}"
    totals: list[tuple[CheckName, str]] = [
        ("prompt_tokens", f"{prompts} of {len(cases)} prompts equal"),
        ("greedy_tokens", tokens),
        ("batch", batch),
    ]
    return [(check, words, _verdict(report, check)) for check, words in totals]


def _as_in_float32(report: ParityReport) -> str:
    """How many tokens each side has in common with PyTorch in float32 before they part."""
    bundle = sum(_common(case.token_ids, case.float32_token_ids) for case in report.cases)
    pytorch = sum(
        _common(case.reference_token_ids, case.float32_token_ids) for case in report.cases
    )
    whole = sum(len(case.float32_token_ids) for case in report.cases)
    return f"of {whole} in float32 {bundle}, PyTorch in {report.precision} {pytorch}"


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)


def shown(value: float | None, *, exact: bool = False) -> str:
    """A number in a few characters.

    Args:
        value: None is shown as a dash.
        exact: whether zero is shown as "exact".
    """
    if value is None:
        return "-"
    if value == 0:
        return "exact" if exact else "0"
    return f"{value:.2e}"


def _row(report: ParityReport, check: CheckName, measured: Iterable[_Measured]) -> list[SummaryRow]:
    entries = list(measured)
    if not entries:
        return []
    worst = max(entries, key=lambda entry: entry.badness)
    cosines = [e.comparison.cosine for e in entries if e.comparison.cosine is not None]
    error, limit = worst.comparison.max_abs, worst.limit
    return [
        SummaryRow(
            check=check,
            max_abs=shown(error),
            limit=shown(limit, exact=True),
            mean_abs=shown(worst.comparison.mean_abs),
            cosine=f"{min(cosines):.9f}" if cosines else "-",
            case=worst.case,
            ratio=None if error is None or not limit else error / limit,
            verdict=_verdict(report, check),
        )
    ]


def _largest(values: Iterable[float | None]) -> str:
    return shown(max((value for value in values if value is not None), default=None))


def _verdict(report: ParityReport, check: CheckName) -> Verdict:
    return worst_verdict(one.verdict for one in report.findings if one.check == check)
