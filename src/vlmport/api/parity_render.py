"""Shows a parity report: a table on the terminal, JSON, HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from vlmport.api.parity_html import report_html
from vlmport.api.parity_report import report_json
from vlmport.api.parity_summary import answer_totals, summarize, summarize_rounding

if TYPE_CHECKING:
    from rich.console import Console

    from vlmport.api.parity_report import ParityReport, Verdict

__all__ = ["print_report", "report_html", "report_json"]

_STYLES: dict[Verdict, str] = {"PASS": "green", "NEAR_TIE": "yellow", "FAIL": "bold red"}
_MOST_FINDINGS = 12


def print_report(report: ParityReport, console: Console) -> None:
    """Prints one row a check, then what is not PASS, then the verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    for heading in ("max_abs", "tolerance", "mean_abs", "cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("worst case")  # alone may wrap: a narrow terminal must not cut numbers
    for row in summarize(report):
        numbers = (row.max_abs, row.limit, row.mean_abs, row.cosine)
        table.add_row(_verdict(row.verdict), row.check, *numbers, Text(row.case))
    console.print(table)
    _print_rounding(report, console)
    for check, words, verdict in answer_totals(report):
        line = Text(f"{check:<15}{words}  ")
        console.print(line.append_text(_verdict(verdict)), soft_wrap=True)
    _print_findings(report, console)
    steps = sum(len(case.steps) for case in report.cases)
    console.print(
        Text.assemble(
            "\n",
            _verdict(report.verdict),
            f"  {len(report.cases)} cases, {steps} steps compared on {report.backend} "
            f"in {report.precision}, {report.seconds:.1f} s",
        ),
        soft_wrap=True,
    )


def _print_rounding(report: ParityReport, console: Console) -> None:
    rows = summarize_rounding(report)
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Beside PyTorch in float32")
    table.add_column("", no_wrap=True)
    for heading in ("bundle max", "PyTorch max", "bundle mean", "PyTorch mean"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.check, row.bundle, row.pytorch, row.bundle_mean, row.pytorch_mean)
    console.print(table)


def _print_findings(report: ParityReport, console: Console) -> None:
    worst_first = sorted(report.findings, key=lambda finding: finding.verdict != "FAIL")
    if worst_first:
        console.print()
    for finding in worst_first[:_MOST_FINDINGS]:
        line = Text.assemble(_verdict(finding.verdict), f"  {finding.message}")
        console.print(line, soft_wrap=True)
    hidden = len(worst_first) - _MOST_FINDINGS
    if hidden > 0:
        console.print(f"... and {hidden} more; --json and --html list them all", style="dim")
    for reason in report.skipped:
        console.print(Text(f"skipped  {reason}", style="dim"), soft_wrap=True)


def _verdict(verdict: Verdict) -> Text:
    return Text(verdict, style=_STYLES[verdict])
