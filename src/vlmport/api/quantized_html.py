"""A quantized bundle's parity report as one HTML file: inline CSS and SVG, no script."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from vlmport.api.layer_svg import LayerPoint, layer_plot
from vlmport.api.parity_svg import Rule, Series, line_plot
from vlmport.api.quantized_summary import decibels, figure_rows, format_words
from vlmport.api.report_page import page_environment

if TYPE_CHECKING:
    from vlmport.api.agreement import AnswerAgreement
    from vlmport.api.layer_comparison import LayerError
    from vlmport.api.quantized_report import QuantizedReport

__all__ = ["quantized_report_html"]

_TEMPLATE = "quantized.html.j2"


def quantized_report_html(report: QuantizedReport) -> str:
    """Renders everything in a report; texts of prompts and answers are escaped."""
    layers = report.layers.layers if report.layers else ()
    graphs = dict.fromkeys(layer.graph for layer in layers)
    return (
        page_environment()
        .get_template(_TEMPLATE)
        .render(
            report=report,
            rows=figure_rows(report),
            formats=format_words(report),
            divergences=Markup(_divergences(report)),
            layer_plots=[
                (graph, Markup(_layer_plot(report, [one for one in layers if one.graph == graph])))
                for graph in graphs
            ],
            decibels=decibels,
            largest=_largest,
        )
    )


def _largest(answer: AnswerAgreement) -> float | None:
    return max((step.kl for step in answer.steps if step.kl is not None), default=None)


def _divergences(report: QuantizedReport) -> str:
    worst = max(report.answers, key=lambda answer: _largest(answer) or 0.0, default=None)
    series = [
        Series(
            answer.question,
            tuple((index, step.kl) for index, step in enumerate(answer.steps)),
            "main" if answer is worst else "faint",
        )
        # SVG paints in order: what comes last lies on top.
        for answer in sorted(report.answers, key=lambda answer: answer is worst)
    ]
    limit = next(row.limit for row in report.tolerances if row.quantity == "kl_mean")
    rule = Rule(limit, f"tolerance of the mean {limit:g}")
    return line_plot(series, rule, title="Divergence of the next token by step")


def _layer_plot(report: QuantizedReport, layers: list[LayerError]) -> str:
    limit = next(row.limit for row in report.tolerances if row.quantity == "layer_snr")
    points = [
        LayerPoint(one.layer, one.signal.snr_db, one.signal.gain_free_snr_db, one.signal.nonfinite)
        for one in layers
    ]
    rule = Rule(limit, f"tolerance {limit:g} dB")
    return layer_plot(points, rule, title="Signal-to-noise ratio of each layer")
