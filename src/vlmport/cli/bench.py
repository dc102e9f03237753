"""`vlmport bench`: how fast is a bundle?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.progress import RichProgress
from vlmport.cli.report_files import check_is_writable

__all__ = ["bench_command"]


def bench_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder.")],
    backend: Annotated[str, typer.Option(metavar="NAME", help="What runs it.")] = "onnxruntime",
    engines: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Engines to run; else those of the bundle that fit."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Other backends, torch and torch-compile; joined by commas."
        ),
    ] = "",
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="The bundle's source; PyTorch needs it."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Rows decoded together.")] = "1,4,8",
    context: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens before decoding begins.")
    ] = "128,1024",
    images: Annotated[
        str, typer.Option(metavar="N,...", help="Pictures of the prompts for the first token.")
    ] = "0,1",
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Text tokens of these prompts.")
    ] = "64,512",
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Decode steps timed a round.")] = 32,
    rounds: Annotated[int, typer.Option(metavar="N", help="Times each point is measured.")] = 5,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Worker threads.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every sample as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report with plots.")
    ] = None,
) -> None:
    """Measure how fast a [bold]bundle[/bold] is: first token, decoding, memory.

    Contenders run in turn, each in a process of its own. A contender or a point
    that cannot be run is named with the reason.

    [dim]$[/dim] vlmport bench [cyan]bundle/[/cyan] --against torch --checkpoint [cyan]model/[/cyan]
    """
    for file in (json_file, html_file):
        check_is_writable(file)
    from vlmport.api.bench import BenchOptions, bench
    from vlmport.api.bench_report import bench_json

    options = BenchOptions(
        bundle=bundle,
        backend=backend,
        engines=engines,
        against=tuple(name.strip() for name in against.split(",") if name.strip()),
        checkpoint=checkpoint,
        batches=_numbers(batch, "--batch"),
        contexts=_numbers(context, "--context"),
        images=_numbers(images, "--images"),
        prompt_tokens=_numbers(prompt_tokens, "--prompt-tokens"),
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
    )
    with RichProgress() as progress:
        report = bench(options, progress)
    from rich.console import Console

    from vlmport.api.bench_render import print_bench

    # Without a terminal rich assumes 80 columns, which would cut numbers off in a log.
    print_bench(report, Console(width=None if sys.stdout.isatty() else 120))
    if json_file is not None:
        json_file.write_text(bench_json(report), encoding="utf-8")
    if html_file is not None:
        from vlmport.api.bench_html import bench_html

        html_file.write_text(bench_html(report), encoding="utf-8")


def _numbers(words: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError as error:
        msg = f"found {words!r}; expected numbers joined by commas"
        raise typer.BadParameter(msg, param_hint=option) from error
