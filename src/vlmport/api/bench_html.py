"""A benchmark as one HTML file: inline CSS and SVG, no script, no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from vlmport.api.bench_render import environment_words, mebibytes, shown_ratio, shown_spread
from vlmport.api.bench_svg import Curve, curve_plot
from vlmport.api.report_page import page_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmport.api.bench_report import BenchReport

__all__ = ["bench_html"]

_STYLES = 6  # colours that the page's CSS has


@dataclass(frozen=True, slots=True)
class _Plot:
    title: str
    svg: Markup


def bench_html(report: BenchReport) -> str:
    """Renders tables and plots; texts are escaped."""
    styles = {one.name: f"c{place % _STYLES}" for place, one in enumerate(report.contenders)}
    template = page_environment().get_template("bench.html.j2")
    return template.render(
        report=report,
        machine=environment_words(report.environment),
        styles=styles,
        plots=[*_first_token_plots(report, styles), *_decode_plots(report, styles)],
        spread=shown_spread,
        ratio=shown_ratio,
        mebibytes=mebibytes,
    )


def _first_token_plots(report: BenchReport, styles: dict[str, str]) -> Iterator[_Plot]:
    for images in sorted({one.images for one in report.first_token}):
        curves = []
        for name, style in styles.items():
            points = {
                one.text_tokens + one.image_tokens: one.milliseconds
                for one in report.first_token
                if one.contender == name and one.images == images and one.milliseconds
            }
            if points:
                curves.append(Curve(name, tuple(sorted(points.items())), style))
        title = f"Time to first token, {images} image{'' if images == 1 else 's'}, ms"
        yield from _plot(curves, title, "tokens of the prompt")


def _decode_plots(report: BenchReport, styles: dict[str, str]) -> Iterator[_Plot]:
    for context in sorted({one.context for one in report.decode}):
        curves = []
        for name, style in styles.items():
            points = {
                one.batch: one.tokens_per_second
                for one in report.decode
                if one.contender == name and one.context == context and one.tokens_per_second
            }
            if points:
                curves.append(Curve(name, tuple(sorted(points.items())), style))
        yield from _plot(curves, f"Decoding at context {context}, tokens/s", "batch")


def _plot(curves: list[Curve], title: str, x_axis: str) -> Iterator[_Plot]:
    if curves:  # what was not run at all is named in the tables
        yield _Plot(title, Markup(curve_plot(curves, title=title, x_axis=x_axis)))
