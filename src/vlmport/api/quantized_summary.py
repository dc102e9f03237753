"""A quantized bundle's figures in rows that are ready to be shown, on a terminal and in HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmport.api.layer_comparison import LayerError
    from vlmport.api.quantized_report import BundleFigures, QuantizedReport
    from vlmport.api.tolerances import QuantizedTolerance

__all__ = ["FigureRow", "decibels", "figure_rows", "format_words", "worst_layers"]


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One figure of the quantized bundle, and of the float bundle if that was given.

    Attributes:
        name: of the figure.
        quantized: its value.
        float_bundle: its value there, "" if no float bundle was given.
        limit: what it is held against, "" if it is not judged.
        is_bad: whether it misses the limit.
    """

    name: str
    quantized: str
    float_bundle: str
    limit: str
    is_bad: bool


def figure_rows(report: QuantizedReport) -> list[FigureRow]:
    """All figures, in the order of the data's way through the model."""
    limits: dict[str, QuantizedTolerance] = {row.quantity: row for row in report.tolerances}
    quantized = _figures(report.quantized)
    beside = _figures(report.float_bundle) if report.float_bundle else {}
    bad = _missed(report.quantized, limits)
    return [
        FigureRow(name, value, beside.get(name, ""), _limit(name, limits), name in bad)
        for name, value in quantized.items()
    ]


def format_words(report: QuantizedReport) -> str:
    """Which layers have which format: "decoder 17 int8, projector 2 int8"."""
    return ", ".join(
        f"{graph} " + " + ".join(f"{count} {name}" for name, count in layers.items())
        for graph, layers in report.formats.items()
    )


def worst_layers(report: QuantizedReport, count: int) -> list[LayerError]:
    """The layers of the lowest signal-to-noise ratio without gains, the worst first."""
    if report.layers is None:
        return []
    return sorted(report.layers.layers, key=_severity)[:count]


def decibels(value: float | None, *, nonfinite: int = 0) -> str:
    """A ratio in words; None is exact unless there is NaN or Inf."""
    if nonfinite:
        return "NaN or Inf"
    return "exact" if value is None else f"{value:.1f} dB"


def _severity(layer: LayerError) -> float:
    if layer.signal.nonfinite:
        return float("-inf")
    ratio = layer.signal.gain_free_snr_db
    return float("inf") if ratio is None else ratio


def _figures(figures: BundleFigures) -> dict[str, str]:
    agreement = figures.agreement
    rows = {
        _graph_name(one.graph, one.output): decibels(
            one.signal.snr_db, nonfinite=one.signal.nonfinite
        )
        for one in figures.graphs
    }
    return rows | {
        "mean KL of next tokens": _number(agreement.kl_mean),
        "largest KL": _number(agreement.kl_max),
        "likeliest token equal": f"{agreement.top1_agreement:.1%}",
        "likeliest five in common": f"{agreement.top5_overlap:.1%}",
        "mean rank of PyTorch's token": f"{agreement.rank_mean:.2f}",
        "largest rank": str(agreement.rank_max),
        "mean logit difference": _number(agreement.logit_error),
        "signal-to-noise of logits": decibels(
            agreement.logits_snr_db, nonfinite=agreement.nonfinite_steps
        ),
        "answers equal": f"{agreement.answers_equal:.1%}",
        "size of all files": f"{figures.bytes / 1e6:.1f} MB",
    }


def _graph_name(graph: str, output: str) -> str:
    return f"{graph}: {output}"


def _number(value: float | None) -> str:
    return "NaN or Inf" if value is None else f"{value:.3g}"


def _limit(name: str, limits: dict[str, QuantizedTolerance]) -> str:
    if name == "mean KL of next tokens":
        return f"at most {limits['kl_mean'].limit:g}"
    if name == "likeliest token equal":
        return f"at least {limits['top1_agreement'].limit:.0%}"
    if name == "signal-to-noise of logits":
        return f"at least {limits['logits_snr'].limit:g} dB"
    if ": " in name:
        return f"at least {limits['image_graph_snr'].limit:g} dB"
    return ""


def _missed(figures: BundleFigures, limits: dict[str, QuantizedTolerance]) -> set[str]:
    agreement = figures.agreement
    missed = set()
    if agreement.kl_mean is None or agreement.kl_mean > limits["kl_mean"].limit:
        missed.add("mean KL of next tokens")
    if agreement.top1_agreement < limits["top1_agreement"].limit:
        missed.add("likeliest token equal")
    logits = agreement.logits_snr_db
    if agreement.nonfinite_steps or (logits is not None and logits < limits["logits_snr"].limit):
        missed.add("signal-to-noise of logits")
    for one in figures.graphs:
        ratio = one.signal.snr_db
        if one.signal.nonfinite or (ratio is not None and ratio < limits["image_graph_snr"].limit):
            missed.add(_graph_name(one.graph, one.output))
    return missed
