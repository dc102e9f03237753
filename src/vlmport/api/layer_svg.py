"""A plot of decibels over layers, in the style of `vlmport.api.parity_svg`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from vlmport.api.parity_svg import LEFT, TOP, place_x, place_y, rule_line, svg_frame, svg_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.parity_svg import Rule

__all__ = ["LayerPoint", "layer_plot"]


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """One layer.

    Attributes:
        name: shown while the pointer rests on it.
        snr_db: its ratio in decibels, drawn as a dot; None if exact, drawn at the top.
        gain_free_snr_db: the same without gains, drawn as a line; None likewise.
        nonfinite: if not zero, the layer is drawn as a cross.
    """

    name: str
    snr_db: float | None
    gain_free_snr_db: float | None
    nonfinite: int


def layer_plot(points: Sequence[LayerPoint], rule: Rule, *, title: str) -> str:
    """Dots for plain ratios, a line through those without gains, a line at the limit.

    Args:
        points: the layers in the order in which they compute.
        rule: the limit.
        title: told to screen readers.
    """
    low, high = _range(points, rule.value)
    parts = []
    for tick in range(low, high + 1, 10 * max(1, (high - low) // 60)):
        y = place_y((tick - low) / (high - low))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{place_x(1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(svg_text(LEFT - 6, y + 4, str(tick), "end"))
    line, marks = [], []
    for index, point in enumerate(points):
        x = place_x(index / (len(points) - 1) if len(points) > 1 else 0.5)
        hint = f"<title>{escape(point.name)}: {_words(point)}</title>"
        if point.nonfinite:
            marks.append(f'<path class="cross" d="M{x - 4:.1f} {TOP}l8 8m0 -8l-8 8">{hint}</path>')
            continue
        heights = [
            place_y(_fraction(value, low, high)) for value in (point.snr_db, point.gain_free_snr_db)
        ]
        line.append(f"{x:.1f},{heights[1]:.1f}")
        marks.append(
            f'<circle class="main" cx="{x:.1f}" cy="{heights[0]:.1f}" r="3">{hint}</circle>'
        )
    parts.append(f'<polyline class="faint" points="{" ".join(line)}"/>')
    parts += marks
    parts.append(rule_line(place_y(_fraction(rule.value, low, high)), rule.label))
    parts.append(
        svg_text(place_x(1), place_y(0) + 18, f"decibels of {len(points)} layers, in order", "end")
    )
    return svg_frame(title, parts)


def _range(points: Sequence[LayerPoint], limit: float) -> tuple[int, int]:
    values = [point.snr_db for point in points] + [point.gain_free_snr_db for point in points]
    known = [value for value in values if value is not None] + [limit, 0.0]
    # Far below zero nothing is left of the signal, however far.
    low = max(-20, math.floor(min(known) / 10) * 10)
    return low, max(low + 10, math.ceil(max(known) / 10) * 10)


def _fraction(value: float | None, low: int, high: int) -> float:
    return 1.0 if value is None else min(1.0, max(0.0, (value - low) / (high - low)))


def _words(point: LayerPoint) -> str:
    if point.nonfinite:
        return f"{point.nonfinite} NaN or Inf"
    if point.snr_db is None or point.gain_free_snr_db is None:
        return "exact"
    return f"{point.snr_db:.1f} dB, {point.gain_free_snr_db:.1f} dB without gains"
