"""Compares a half-precision bundle with PyTorch in float32, beside PyTorch's own rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.api.parity_answers import comparable_steps
from vlmport.api.parity_measure import compare_arrays, fault_of
from vlmport.api.parity_report import Finding, RoundingCheck
from vlmport.api.tolerances import tolerance_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.parity_answers import Answer
    from vlmport.api.parity_report import Comparison

__all__ = ["answer_distance", "rounding_findings", "rounding_of"]

FLOAT32 = "PyTorch in float32"


def answer_distance(found: Answer, reference: Answer) -> Comparison:
    """The logits of all steps that two answers compute after the same tokens, as one array."""
    steps = comparable_steps(found, reference)
    return compare_arrays(found.logits[:steps], reference.logits[:steps])


def rounding_of(checks: Sequence[RoundingCheck], quantity: str) -> Comparison | None:
    """PyTorch in the bundle's precision beside PyTorch in float32, if it was measured."""
    return next((check.pytorch for check in checks if check.quantity == quantity), None)


def rounding_findings(checks: Sequence[RoundingCheck], precision: str, case: str) -> list[Finding]:
    """Holds the bundle's distance to float32 against PyTorch's own, by the same tolerances.

    What must equal PyTorch in the same precision exactly is judged there alone.
    """
    findings = []
    for check in checks:
        tolerance = tolerance_for(check.quantity, precision)
        if tolerance.basis != "rounding":
            continue
        fault = fault_of(check.bundle, tolerance, FLOAT32, check.pytorch)
        if fault:
            message = f"{check.quantity} beside {FLOAT32}, case {case!r}: {fault}"
            findings.append(Finding("FAIL", check.quantity, message))
    return findings
