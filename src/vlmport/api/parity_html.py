"""A parity report as one HTML file: inline CSS and SVG, no script, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from vlmport.api.parity_summary import answer_totals, shown, summarize, summarize_rounding
from vlmport.api.parity_svg import Rule, Series, bar_plot, histogram_plot, line_plot
from vlmport.api.report_page import page_environment
from vlmport.api.tolerances import near_tie_margin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.parity_report import CaseReport, ParityReport, Verdict

__all__ = ["report_html"]

_TEMPLATE = "parity.html.j2"
_BAR_STYLES: dict[Verdict, str] = {"PASS": "good", "NEAR_TIE": "near", "FAIL": "bad"}


def report_html(report: ParityReport) -> str:
    """Renders everything in a report; texts of prompts and answers are escaped."""
    worst = max(report.cases, key=_worst_error, default=None)
    return (
        page_environment()
        .get_template(_TEMPLATE)
        .render(
            report=report,
            rows=summarize(report),
            totals=answer_totals(report),
            rounding=summarize_rounding(report),
            steps=sum(len(case.steps) for case in report.cases),
            bars=Markup(_bars(report)),
            errors=Markup(_error_plot(report.cases, worst)),
            gaps=Markup(_gap_plot(report.cases, worst)),
            histogram=Markup(_histogram(report)),
            worst=worst,
            case_plots=[
                (Markup(_error_plot((case,), case)), Markup(_gap_plot((case,), case)))
                for case in report.cases
            ],
        )
    )


def _worst_error(case: CaseReport) -> float:
    return max((step.comparison.max_abs or 0.0 for step in case.steps), default=0.0)


def _limit(cases: Sequence[CaseReport]) -> float:
    """The widest limit of the cases' logits; that of half precision differs from case to case."""
    # Without an answer there is nothing to draw a limit beside, but the axis needs a place for it.
    return max((case.logits_limit for case in cases if case.logits_limit), default=1.0)


def _bars(report: ParityReport) -> str:
    rows = []
    for row in summarize(report):
        if row.max_abs == shown(None):
            words = "not comparable"
        else:
            words = f"{row.max_abs}{', must be 0' if row.limit == 'exact' else f' of {row.limit}'}"
        rows.append((row.check, row.ratio, words, _BAR_STYLES[row.verdict]))
    return bar_plot(rows, title="Largest error of each check as a fraction of its tolerance")


def _error_plot(cases: tuple[CaseReport, ...], main: CaseReport | None) -> str:
    series = []
    for case in _main_last(cases, main):
        points = tuple((step.step, step.comparison.max_abs) for step in case.steps)
        series.append(Series(case.name, points, "main" if case is main else "faint"))
    limit = _limit(cases)
    return line_plot(series, Rule(limit, f"tolerance {limit:.0e}"), title="Logit error by step")


def _gap_plot(cases: tuple[CaseReport, ...], main: CaseReport | None) -> str:
    series = []
    for case in _main_last(cases, main):
        points = tuple((step.step, step.gap) for step in case.steps)
        series.append(Series(case.name, points, "main" if case is main else "faint"))
    margin = near_tie_margin(_limit(cases))
    rule = Rule(margin, f"near-tie margin {margin:.0e}")
    return line_plot(series, rule, title="Gap of PyTorch's two largest logits by step", least=-6)


def _main_last(cases: tuple[CaseReport, ...], main: CaseReport | None) -> list[CaseReport]:
    """SVG paints in order: what comes last lies on top."""
    return sorted(cases, key=lambda case: case is main)


def _histogram(report: ParityReport) -> str:
    edges = report.error_bin_edges
    totals = [0] * (len(edges) + 1)
    for case in report.cases:
        for index, count in enumerate(case.error_counts):
            totals[index] += count
    limit = _limit(report.cases)
    rule = Rule(limit, f"tolerance {limit:.0e}")
    return histogram_plot(edges, totals, rule, title="Histogram of the errors of all logits")
