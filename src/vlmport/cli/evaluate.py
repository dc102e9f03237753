"""`vlmport evaluate`: how many questions does a bundle answer right?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlmport.cli.backend_options import DEFAULT_BACKEND, BackendOption, EnginesOption
from vlmport.cli.progress import RichProgress
from vlmport.cli.report_files import check_is_writable

if TYPE_CHECKING:
    from rich.console import Console

    from vlmport.api.evaluate import EvaluateOptions
    from vlmport.api.perplexity import PerplexityOptions

__all__ = ["evaluate_command"]

_TEXT = "Perplexity"


def evaluate_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder.")],
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA.jsonl",
            help="Questions, one JSON object a line: image, question, answer or answers, "
            "and if wanted id and kind.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="A bundle to compare with, such as the float one."),
    ] = None,
    metric: Annotated[
        Literal["exact", "vqa", "pope", "anls"], typer.Option(help="How an answer is scored.")
    ] = "exact",
    fold: Annotated[
        bool, typer.Option("--fold", help="Let exact overlook case and punctuation.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only the first N questions, or windows."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Questions, or windows of text, computed together."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of an answer.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep answers here as they come; go on after a stop."),
    ] = None,
    against_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same for the bundle of --against.")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Worker threads.")] = None,
    backend: BackendOption = DEFAULT_BACKEND,
    engines: EnginesOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report with plots.")
    ] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT_FILE",
            rich_help_panel=_TEXT,
            help="Instead of questions: how well the language model predicts this text.",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=_TEXT, help="Tokens of a window.")
    ] = 512,
) -> None:
    """Ask a [bold]bundle[/bold] questions with known answers, and score it.

    With --against, two bundles side by side: the difference in points, which
    answers flipped, and whether that could be chance.

    [dim]$[/dim] vlmport evaluate [cyan]int8/ questions.jsonl[/cyan] --against fp32/
    """
    if (data is None) == (perplexity is None):
        hint = "DATA.jsonl / --perplexity"
        raise typer.BadParameter("give one of them, not both", param_hint=hint)
    for file in (json_file, html_file, state, against_state):
        check_is_writable(file)
    reports = (json_file, html_file)
    if perplexity is not None:
        from vlmport.api.perplexity import PerplexityOptions

        text = PerplexityOptions(
            bundle, perplexity, window, against, limit, batch, threads, backend, engines
        )
        _predict(text, *reports)
    elif data is not None:
        from vlmport.api.evaluate import EvaluateOptions

        asked = EvaluateOptions(
            bundle=bundle,
            data=data,
            metric=metric,
            normalization="fold" if fold else "none",
            against=against,
            limit=limit,
            batch=8 if batch is None else batch,
            max_new_tokens=max_new_tokens,
            state_file=state,
            against_state_file=against_state,
            threads=threads,
            backend=backend,
            engines=engines,
        )
        _ask(asked, *reports)


def _ask(options: EvaluateOptions, json_file: Path | None, html_file: Path | None) -> None:
    from vlmport.api.evaluate import evaluate
    from vlmport.api.evaluation import evaluation_json
    from vlmport.api.evaluation_html import evaluation_html
    from vlmport.api.evaluation_render import print_evaluation

    with RichProgress() as progress:
        evaluation = evaluate(options, progress)
    print_evaluation(evaluation, _console())
    if json_file is not None:
        json_file.write_text(evaluation_json(evaluation), encoding="utf-8")
    if html_file is not None:
        html_file.write_text(evaluation_html(evaluation), encoding="utf-8")


def _predict(options: PerplexityOptions, json_file: Path | None, html_file: Path | None) -> None:
    from vlmport.api.evaluation_html import perplexity_html
    from vlmport.api.evaluation_render import print_perplexity
    from vlmport.api.perplexity import perplexity, perplexity_json

    with RichProgress() as progress:
        report = perplexity(options, progress)
    print_perplexity(report, _console())
    if json_file is not None:
        json_file.write_text(perplexity_json(report), encoding="utf-8")
    if html_file is not None:
        html_file.write_text(perplexity_html(report), encoding="utf-8")


def _console() -> Console:
    from rich.console import Console

    # Without a terminal rich assumes 80 columns, which would cut numbers off in a log.
    return Console(width=None if sys.stdout.isatty() else 120)
