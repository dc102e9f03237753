"""`vlmport doctor`: what can run here, and what to install for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlmport.api.doctor import Diagnosis

__all__ = ["doctor_command"]


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell which backends, GPUs and tools are usable, and what to install for the rest.

    [dim]$[/dim] vlmport doctor
    """
    from rich.console import Console

    from vlmport.api.doctor import diagnosis_json, doctor

    diagnosis = doctor()
    if as_json:
        typer.echo(diagnosis_json(diagnosis))
        return
    console = Console(highlight=False)
    console.print(
        f"vlmport {diagnosis.vlmport}, Python {diagnosis.python}, {diagnosis.platform}\n"
        f"run bundles: {_yes_or_no(diagnosis.can_run)}; "
        f"export checkpoints: {_yes_or_no(diagnosis.can_export)}"
    )
    console.print(_table(diagnosis))
    for warning in diagnosis.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", soft_wrap=True)


def _yes_or_no(value: bool) -> str:
    return "[green]yes[/green]" if value else "[red]no[/red]"


def _table(diagnosis: Diagnosis) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(width=3, justify="right")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    group = ""
    for check in diagnosis.checks:
        if check.group != group:
            group = check.group
            table.add_row("", Text(f"\n{group}", "bold"), "")
        found = Text(check.found)
        if check.advice:
            found.append(f"\n{check.advice}", "cyan")
        mark = Text("yes", "green") if check.usable else Text("no", "red")
        table.add_row(mark, check.name, found)
    return table
