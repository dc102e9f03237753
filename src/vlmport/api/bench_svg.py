"""Curves over lengths as SVG; colours come from the page's CSS classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from vlmport.api.evaluation_svg import round_step
from vlmport.api.parity_svg import LEFT, place_x, place_y, svg_frame, svg_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.bench_report import Spread

__all__ = ["Curve", "curve_plot"]

_TICKS = 4  # of the y axis, about
_LABEL_Y, _AXIS_Y = 210, 226  # under the x axis, in the plot's height of 230


@dataclass(frozen=True, slots=True)
class Curve:
    """One line with its spread.

    Attributes:
        label: shown while the pointer rests on a point.
        points: (x, y) by rising x.
        style: CSS class.
    """

    label: str
    points: tuple[tuple[int, Spread], ...]
    style: str


def curve_plot(curves: Sequence[Curve], *, title: str, x_axis: str) -> str:
    """Lines over a logarithmic x axis and a y axis from 0, a bar from lowest to highest sample.

    Args:
        curves: one or more, each with one point or more.
        title: told to screen readers.
        x_axis: words under the axis.
    """
    marks = sorted({x for curve in curves for x, _ in curve.points})
    highest = max(value.high for curve in curves for _, value in curve.points)
    step = round_step(highest / _TICKS)
    top = step * math.ceil(highest / step)
    parts = []
    for tick in range(round(top / step) + 1):
        y = place_y(tick * step / top)
        parts.append(_line("grid", LEFT, y, place_x(1), y))
        parts.append(svg_text(LEFT - 6, y + 4, f"{tick * step:g}", "end"))
    parts += [svg_text(_x(x, marks), _LABEL_Y, str(x), "middle") for x in marks]
    parts.append(svg_text(place_x(1), _AXIS_Y, x_axis, "end"))
    parts += [_curve(curve, marks, top) for curve in curves]
    return svg_frame(title, parts)


def _curve(curve: Curve, marks: Sequence[int], top: float) -> str:
    path, parts = [], []
    for length, value in curve.points:
        x, y = _x(length, marks), place_y(value.median / top)
        path.append(f"{x:.1f},{y:.1f}")
        parts.append(_line(curve.style, x, place_y(value.low / top), x, place_y(value.high / top)))
        words = f"{curve.label}, {length}: {value.median:.4g} ({value.low:.4g} to {value.high:.4g})"
        parts.append(
            f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(words)}</title></circle>"
        )
    line = f'<polyline class="{curve.style}" points="{" ".join(path)}"/>'
    return line + "".join(parts)


def _x(length: int, marks: Sequence[int]) -> float:
    low, high = math.log(marks[0]), math.log(marks[-1])
    # Not to the edges: a label in the middle of its mark would be cut off.
    return place_x(0.5 if low == high else 0.05 + 0.9 * (math.log(length) - low) / (high - low))


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'
