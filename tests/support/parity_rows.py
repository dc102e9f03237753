"""Rows of the table of families and their variants that a test run prints at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.parity_bundle import open_bundle
from vlmport.api.parity_compare import compare
from vlmport.api.parity_report import worst_verdict
from vlmport.api.progress import SilentProgress
from vlmport.export.family import load_reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlmport.api.builtin_cases import Case
    from vlmport.api.parity_report import CaseReport
    from vlmport.contract import Precision

__all__ = ["ROWS", "ParityRow", "check_parity_row", "table"]


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One variant of a family beside PyTorch.

    Attributes:
        family: name of the family.
        row: the variant.
        cases: chats that were compared, each alone and all in one batch.
        tokens: greedy tokens that were compared with PyTorch's.
        logits_error: largest |bundle - PyTorch| of all logits.
        verdict: of the parity report.
    """

    family: str
    row: str
    cases: int
    tokens: int
    logits_error: float
    verdict: str


# Filled while tests run; conftest prints it.
ROWS: list[ParityRow] = []


def check_parity_row(
    family: str,
    row: str,
    checkpoint: Path,
    bundle: Path,
    cases: Sequence[Case],
    max_new_tokens: int = 64,
    precision: Precision = "float32",
) -> ParityRow:
    """Compares a bundle with PyTorch as `vlmport parity` does, and asserts that all is equal.

    Each case alone against transformers (pixels bit for bit, prompt ids, every graph, logits of
    every greedy step), then all cases in one batch against each alone. In half precision each
    also against transformers in float32, and tokens may part at near ties.
    """
    is_half = precision != "float32"
    reports = compare(
        load_reference(checkpoint, precision),
        open_bundle(bundle),
        cases,
        max_new_tokens,
        SilentProgress(),
        precision=precision,
        float32=load_reference(checkpoint) if is_half else None,
    )
    verdict = worst_verdict(report.verdict for report in reports)
    found = ParityRow(
        family=family,
        row=f"{row}, {precision}" if is_half else row,
        cases=len(reports),
        tokens=sum(len(report.token_ids) for report in reports),
        logits_error=max(_errors(reports), default=float("nan")),
        verdict=verdict,
    )
    ROWS.append(found)
    findings = [finding.message for report in reports for finding in report.findings]
    assert verdict == "PASS" or (is_half and verdict == "NEAR_TIE"), "\n".join(findings)
    assert is_half or all(report.token_ids == report.reference_token_ids for report in reports)
    return found


def table(rows: Sequence[ParityRow]) -> list[str]:
    """The rows as lines of text."""
    width = max(len(row.row) for row in rows)
    head = f"{'family':10} {'row':{width}} cases tokens  max |logits|  verdict"
    lines = [
        f"{row.family:10} {row.row:{width}} {row.cases:5} {row.tokens:6}  "
        f"{row.logits_error:12.1e}  {row.verdict}"
        for row in sorted(rows, key=lambda row: (row.family, row.row))
    ]
    return [head, *lines]


def _errors(reports: Sequence[CaseReport]) -> list[float]:
    errors = (step.comparison.max_abs for report in reports for step in report.steps)
    return [error for error in errors if error is not None]
