"""`vlmport parity`: does the bundle answer as PyTorch does?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.progress import RichProgress
from vlmport.cli.report_files import check_is_writable

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

    [dim]$[/dim] vlmport parity [cyan]checkpoint/ bundle/[/cyan] --html report.html
    """
    for file in (json_file, html_file):
        check_is_writable(file)
    from rich.console import Console

    from vlmport.api.parity import ParityOptions, parity
    from vlmport.api.parity_render import print_report, report_html, report_json

    options = ParityOptions(
        checkpoint, bundle, tuple(image or ()), prompt, max_new_tokens, family_file
    )
    with RichProgress() as progress:
        report = parity(options, progress)
    # Without a terminal rich assumes 80 columns, which would cut numbers off in a log.
    print_report(report, Console(width=None if sys.stdout.isatty() else 120))
    if json_file is not None:
        json_file.write_text(report_json(report), encoding="utf-8")
    if html_file is not None:
        html_file.write_text(report_html(report), encoding="utf-8")
    raise typer.Exit(1 if report.verdict == "FAIL" else 0)
