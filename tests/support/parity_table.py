"""The table of families and their variants that a test run prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ROWS", "ParityRow", "table"]


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
