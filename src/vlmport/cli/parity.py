"""`vlmport parity`: does the bundle answer as PyTorch does?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.cli.backend_options import DEFAULT_BACKEND, BackendOption, EnginesOption
from vlmport.cli.progress import RichProgress
from vlmport.cli.report_files import check_is_writable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from vlmport.api.parity import ParityOptions

__all__ = ["parity_command"]


def parity_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Its folder.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that was made from it.")],
    image: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="A picture; else built-in ones.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A question; else built-in ones.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens to compare in each answer.")
    ] = 64,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report with plots.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FLOAT_BUNDLE",
            help="What a quantized bundle was made from: adds its figures, and layer by layer.",
        ),
    ] = None,
    backend: BackendOption = DEFAULT_BACKEND,
    engines: EnginesOption = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect",
            help="Find the first graph and layer of --backend tensorrt or tensorrt-rtx that "
            "leaves tolerance beside the same bundle on the CPU.",
        ),
    ] = False,
    family_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A Python file with one more family of models. Its code is run."
        ),
    ] = None,
) -> None:
    """Compare a [bold]bundle[/bold] with the PyTorch model that it was made from.

    Compares the preprocessing, every graph, the logits of every step and
    the greedy tokens. The verdict is [green]PASS[/green], [yellow]NEAR_TIE[/yellow] (tokens part
    where PyTorch itself is undecided) or [red]FAIL[/red]; only FAIL exits with 1.

    A bundle whose layers have integer weights is compared with PyTorch in float32
    by the distributions of the next token instead of number by number.

    With --bisect the bundle on TensorRT is compared with itself on the CPU, and a
    layer that leaves tolerance is looked for; exits with 1 if there is one.

    [dim]$[/dim] vlmport parity [cyan]checkpoint/ bundle/[/cyan] --html report.html
    """
    for file in (json_file, html_file):
        check_is_writable(file)
    from vlmport.api.parity import ParityOptions
    from vlmport.api.quantized_parity import has_integer_layers

    options = ParityOptions(
        checkpoint,
        bundle,
        tuple(image or ()),
        prompt,
        max_new_tokens,
        family_file,
        against,
        backend,
        engines,
    )
    if bisect:
        raise typer.Exit(_show_bisect(options, json_file, html_file))
    show = _show_quantized if has_integer_layers(bundle) else _show
    verdict = show(options, json_file, html_file)
    raise typer.Exit(1 if verdict == "FAIL" else 0)


def _show(options: ParityOptions, json_file: Path | None, html_file: Path | None) -> str:
    from vlmport.api.parity import parity
    from vlmport.api.parity_render import print_report, report_html, report_json

    with RichProgress() as progress:
        report = parity(options, progress)
    print_report(report, _console())
    _write(json_file, lambda: report_json(report))
    _write(html_file, lambda: report_html(report))
    return report.verdict


def _show_quantized(options: ParityOptions, json_file: Path | None, html_file: Path | None) -> str:
    from vlmport.api.quantized_html import quantized_report_html
    from vlmport.api.quantized_parity import quantized_parity
    from vlmport.api.quantized_render import print_quantized_report
    from vlmport.api.quantized_report import quantized_report_json

    with RichProgress() as progress:
        report = quantized_parity(options, progress)
    print_quantized_report(report, _console())
    _write(json_file, lambda: quantized_report_json(report))
    _write(html_file, lambda: quantized_report_html(report))
    return report.verdict


def _show_bisect(options: ParityOptions, json_file: Path | None, html_file: Path | None) -> int:
    from vlmport.api.bisect_bundle import bisect_bundle
    from vlmport.api.bisect_report import bisect_report_json, print_bisect_report

    if html_file is not None:
        raise typer.BadParameter("--bisect writes no HTML; use --json", param_hint="--html")
    with RichProgress() as progress:
        report = bisect_bundle(options, progress)
    print_bisect_report(report, _console())
    _write(json_file, lambda: bisect_report_json(report))
    return 1 if report.first_fault is not None else 0


def _console() -> Console:
    from rich.console import Console

    # Without a terminal rich assumes 80 columns, which would cut numbers off in a log.
    return Console(width=None if sys.stdout.isatty() else 120)


def _write(file: Path | None, content: Callable[[], str]) -> None:
    if file is not None:
        file.write_text(content(), encoding="utf-8")
