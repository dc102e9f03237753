"""Compares a variant of a family with PyTorch, and puts it into the table of the test run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.parity_table import ROWS, ParityRow

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

__all__ = ["check_parity_row"]


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


def _errors(reports: Sequence[CaseReport]) -> list[float]:
    errors = (step.comparison.max_abs for report in reports for step in report.steps)
    return [error for error in errors if error is not None]
