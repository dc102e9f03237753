"""Shows an evaluation on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from vlmport.api.evaluation_summary import score_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vlmport.api.evaluation import (
        AnswerComparison,
        Evaluation,
        KindComparison,
        KindScore,
    )
    from vlmport.api.perplexity import PerplexityReport

__all__ = ["interval", "percent", "print_evaluation", "print_perplexity"]


def percent(share: float) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * share:.1f} %"


def interval(score: KindScore) -> str:
    """The ends of its interval in per cent."""
    return f"{100 * score.low:.1f} to {100 * score.high:.1f}"


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Prints one row a kind of question, then the comparison, then what was asked of what."""
    against, comparison = evaluation.against, evaluation.comparison
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("questions", no_wrap=True)
    headings = ["count", evaluation.metric, "95 % interval"]
    if against is not None:
        headings += ["against", "points", "lost", "gained", "p"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    rows = score_rows(evaluation)
    for place, (score, other, compared) in enumerate(rows):
        cells: list[Text | str] = [Text(score.kind), str(score.count)]
        cells += [percent(score.score), interval(score)]
        if other is not None and compared is not None:
            cells += [percent(other.score), *_compared_cells(compared)]
        table.add_row(*cells, style="bold" if place == len(rows) - 1 else None)
    console.print(table)
    _print_yes_no(evaluation, console)
    if against is not None and comparison is not None:
        console.print(Text(_tokens(comparison, len(against.answers))), soft_wrap=True)
    console.print(Text(_closing(evaluation)), soft_wrap=True, style="dim")


def print_perplexity(report: PerplexityReport, console: Console) -> None:
    """Prints the perplexities, and how far two bundles' distributions are apart."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("bundle")
    for heading in ("precision", "perplexity", "nats a token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in (report.bundle, report.against):
        if one is not None:
            figures = (f"{one.perplexity:.4f}", f"{one.mean_nll:.5f}")
            table.add_row(Text(one.bundle), one.precision, *figures)
    console.print(table)
    if report.comparison is not None:
        compared = report.comparison
        console.print(
            f"perplexity {compared.rise_percent:+.3f} %, mean KL divergence "
            f"{compared.mean_kl:.3e} nats, largest {compared.max_kl:.3e}; the likeliest token is "
            f"the same at {compared.top1_agreement:.3%} of the places",
            soft_wrap=True,
        )
    bos = "the beginning-of-sequence token" if report.begins_with_bos else "the first token"
    console.print(
        Text(
            f"{report.predicted_tokens} tokens predicted in {report.windows} windows of "
            f"{report.window}; {bos} of a window is given, not predicted; {report.seconds:.1f} s"
        ),
        style="dim",
        soft_wrap=True,
    )


def _compared_cells(compared: KindComparison) -> Sequence[str]:
    return (
        f"{compared.points:+.2f}",
        str(compared.lost),
        str(compared.gained),
        f"{compared.p:.3g}",
    )


def _print_yes_no(evaluation: Evaluation, console: Console) -> None:
    for one in (evaluation.bundle, evaluation.against):
        if one is not None and one.yes_no is not None:
            figures = one.yes_no
            console.print(
                Text(
                    f"{one.bundle}: precision {percent(figures.precision)}, recall "
                    f"{percent(figures.recall)}, F1 {percent(figures.f1)}, answers yes "
                    f"{percent(figures.yes_ratio)}"
                ),
                soft_wrap=True,
            )


def _tokens(comparison: AnswerComparison, count: int) -> str:
    return (
        f"{comparison.same_answers} of {count} answers have the same tokens; "
        f"{comparison.common_tokens} of {comparison.tokens} tokens equal before the answers part"
    )


def _closing(evaluation: Evaluation) -> str:
    bundle, against = evaluation.bundle, evaluation.against
    words = f"{bundle.bundle} ({bundle.precision}, {bundle.backend})"
    if against is not None:
        words += f" against {against.bundle} ({against.precision})"
    seconds = bundle.seconds + (against.seconds if against else 0.0)
    resumed = bundle.resumed + (against.resumed if against else 0)
    words += f", {evaluation.data}, {seconds:.1f} s"
    return words + (f"; {resumed} answers taken from an earlier run" if resumed else "")
