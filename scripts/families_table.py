"""Writes README's table of families, stages and parity from a run over the bundled checkpoints.

    python scripts/families_table.py             # export, compare, rewrite the table in README.md
    python scripts/families_table.py --dry-run   # print the table

Every checkpoint below examples/ is exported in each precision and compared with PyTorch on
`vlmport parity`'s built-in pictures and prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from marked_table import write_between

from vlmport.api.export import ExportOptions, export
from vlmport.api.parity import ParityOptions, parity
from vlmport.api.parity_report import ParityReport
from vlmport.api.progress import SilentProgress

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
MARKS = "<!-- families: begin -->", "<!-- families: end -->"
PRECISIONS = ("fp32", "fp16", "bf16")
QUANTITIES = ("preprocessing", "vision_encoder", "projector", "embed_tokens")
HEAD = (
    "| family | precision | preprocessing | vision_encoder | projector | embed_tokens | logits "
    "| greedy tokens equal | parity |"
)


def main() -> int:
    """Returns 0 if every family passes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the table, change nothing")
    arguments = parser.parse_args()
    reports = list(_reports())
    table = table_of(reports)
    print(table)
    if not arguments.dry_run:
        write_between(README, MARKS, table)
    return 0 if all(report.verdict != "FAIL" for report in reports) else 1


def table_of(reports: Sequence[ParityReport]) -> str:
    """One row for each report: the largest difference of each stage."""
    rule = "|" + "---|" * (HEAD.count("|") - 1)
    return "\n".join((HEAD, rule, *map(_row, reports)))


def _reports() -> Iterator[ParityReport]:
    for checkpoint in sorted(path.parent for path in REPOSITORY.glob("examples/*/config.json")):
        for precision in PRECISIONS:
            print(f"{checkpoint.name} {precision}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                bundle = Path(folder) / "bundle"
                export(ExportOptions(checkpoint, bundle, precision=precision), SilentProgress())
                yield parity(ParityOptions(checkpoint, bundle), SilentProgress())


def _row(report: ParityReport) -> str:
    cells = [report.family, report.precision, *(_stage(report, name) for name in QUANTITIES)]
    errors = [step.comparison.max_abs for case in report.cases for step in case.steps]
    cells.append(_shown([error for error in errors if error is not None]))
    equal = sum(case.token_ids == case.reference_token_ids for case in report.cases)
    tokens = sum(len(case.token_ids) for case in report.cases)
    cells += [f"{equal} of {len(report.cases)} answers, {tokens} tokens", report.verdict]
    return f"| {' | '.join(cells)} |"


def _stage(report: ParityReport, quantity: str) -> str:
    checks = [check for case in report.cases for check in case.checks]
    found = [check.comparison.max_abs for check in checks if check.quantity == quantity]
    return _shown([error for error in found if error is not None])


def _shown(errors: Sequence[float]) -> str:
    if not errors:
        return "none"
    return "exact" if max(errors) == 0 else f"{max(errors):.1e}"


if __name__ == "__main__":
    sys.exit(main())
