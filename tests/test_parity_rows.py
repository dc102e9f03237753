"""The trained checkpoints, row by row of the table."""

from __future__ import annotations

from pathlib import Path

from support.parity_rows import check_parity_row

from vlmport.api.builtin_cases import builtin_cases

TRAINED = Path(__file__).resolve().parents[1] / "examples" / "tinyllava"


def test_the_trained_checkpoint_answers_as_transformers_does(trained_bundle: Path) -> None:
    check_parity_row("tinyllava", "trained", TRAINED, trained_bundle, builtin_cases())
