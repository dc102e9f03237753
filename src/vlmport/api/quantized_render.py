"""Shows a quantized bundle's parity report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from vlmport.api.quantized_summary import decibels, figure_rows, format_words, worst_layers

if TYPE_CHECKING:
    from rich.console import Console

    from vlmport.api.quantized_report import QuantizedReport

__all__ = ["print_quantized_report"]

_MOST_LAYERS = 12
_STYLES = {"PASS": "green", "FAIL": "bold red"}


def print_quantized_report(report: QuantizedReport, console: Console) -> None:
    """Prints the figures, the worst layers, what is wrong, then the verdict."""
    console.print(_figures(report))
    if report.layers is not None:
        console.print(_layers(report))
        for missing in report.layers.missing:
            line = f"not compared  {missing}: the quantized graph has no value of that name"
            console.print(Text(line, style="yellow"), soft_wrap=True)
    for finding in report.findings:
        fault = Text.assemble(("FAIL", _STYLES["FAIL"]), f"  {finding.message}")
        console.print(fault, soft_wrap=True)
    for reason in report.skipped:
        console.print(Text(f"skipped  {reason}", style="dim"), soft_wrap=True)
    agreement = report.quantized.agreement
    console.print(
        Text.assemble(
            "\n",
            (report.verdict, _STYLES[report.verdict]),
            f"  {agreement.questions} questions, {agreement.steps} next tokens beside PyTorch in "
            f"float32, on {report.backend}: {format_words(report)}, {report.seconds:.1f} s",
        ),
        soft_wrap=True,
    )


def _figures(report: QuantizedReport) -> Table:
    has_float = report.float_bundle is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("beside PyTorch in float32", no_wrap=True)
    if has_float:
        table.add_column("float bundle", justify="right", no_wrap=True)
    table.add_column("quantized", justify="right", no_wrap=True)
    table.add_column("tolerance", no_wrap=True)
    for row in figure_rows(report):
        value = Text(row.quantized, style=_STYLES["FAIL"] if row.is_bad else "")
        cells = [row.float_bundle, value] if has_float else [value]
        table.add_row(row.name, *cells, row.limit)
    return table


def _layers(report: QuantizedReport) -> Table:
    assert report.layers is not None
    shown = worst_layers(report, _MOST_LAYERS)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"The {len(shown)} noisiest of {len(report.layers.layers)} layers beside the float "
        "bundle's, what came in with their inputs included",
        title_justify="left",
    )
    table.add_column("layer")
    for heading in ("SNR", "without gains", "cosine", "max_abs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in shown:
        signal = layer.signal
        table.add_row(
            Text(f"{layer.graph}  {layer.layer}"),
            decibels(signal.snr_db, nonfinite=signal.nonfinite),
            decibels(signal.gain_free_snr_db, nonfinite=signal.nonfinite),
            "-" if signal.cosine is None else f"{signal.cosine:.6f}",
            "-" if signal.max_abs is None else f"{signal.max_abs:.2e}",
        )
    return table
