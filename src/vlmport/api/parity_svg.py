"""Small SVG plots for the HTML report, as strings; colours come from the page's CSS classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LEFT",
    "TOP",
    "Rule",
    "Series",
    "bar_plot",
    "histogram_plot",
    "line_plot",
    "place_x",
    "place_y",
    "rule_line",
    "svg_frame",
    "svg_text",
]

_WIDTH, _HEIGHT = 560, 230
LEFT, _RIGHT, TOP, _BOTTOM = 52, 12, 14, 36


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot.

    Attributes:
        label: shown while the pointer rests on it.
        points: (x, y); y of zero or less is drawn on the floor of the logarithmic axis, None as a
            cross at the top (NaN, Inf or no number at all).
        style: CSS class: "main" or "faint".
    """

    label: str
    points: tuple[tuple[int, float | None], ...]
    style: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A horizontal (or, in a histogram, vertical) line at a limit."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class _LogAxis:
    """Maps a value to a fraction of the axis; whole decades at both ends.

    Attributes:
        low: exponent of the floor.
        high: exponent of the top.
        has_zero: whether the floor stands for zero.
    """

    low: int
    high: int
    has_zero: bool = False

    @classmethod
    def around(cls, values: Sequence[float], least: int) -> _LogAxis:
        logs = [math.log10(value) for value in values if value > 0]
        has_zero = min(values) <= 0
        low = max(least, math.floor(min(logs, default=least)) - has_zero)
        return cls(low, max(low + 1, math.ceil(max(logs, default=low + 1) + 1e-9)), has_zero)

    def fraction(self, value: float) -> float:
        log = math.log10(value) if value > 0 else float(self.low)
        return min(1.0, max(0.0, (log - self.low) / (self.high - self.low)))

    def name(self, exponent: int) -> str:
        return "0" if self.has_zero and exponent == self.low else _power(exponent)

    def ticks(self) -> list[int]:
        step = max(1, math.ceil((self.high - self.low) / 6))
        return list(range(self.low, self.high + 1, step))


def line_plot(series: Sequence[Series], rule: Rule, *, title: str, least: int = -9) -> str:
    """Lines over generated steps on a logarithmic y axis, with a line at a limit.

    Args:
        series: drawn in this order, so that the last lies on top.
        rule: the limit.
        title: told to screen readers.
        least: exponent of the lowest value that the axis may start at.
    """
    known = [y for one in series for _, y in one.points if y is not None]
    axis = _LogAxis.around([*known, rule.value], least)
    last = max((x for one in series for x, _ in one.points), default=0)
    parts = [_y_grid(axis), _x_labels(last)]
    parts += [_line(one, axis, last) for one in series]
    parts.append(rule_line(place_y(axis.fraction(rule.value)), rule.label))
    return svg_frame(title, parts)


def bar_plot(rows: Sequence[tuple[str, float | None, str, str]], *, title: str) -> str:
    """Horizontal bars of error / tolerance on a logarithmic axis that ends beyond 1.

    Args:
        rows: (label, ratio or None for no bar, words beside the bar, CSS class).
        title: told to screen readers.
    """
    axis = _LogAxis.around([1e-4, 5.0, *(row[1] or 1.0 for row in rows)], -6)
    axis = _LogAxis(axis.low, min(axis.high, 6))
    left, right, pitch = 120, _WIDTH - 110, 30
    height = TOP + pitch * len(rows) + _BOTTOM

    def place(value: float) -> float:
        return left + axis.fraction(value) * (right - left)

    parts = []
    for exponent in axis.ticks():
        x = place(10.0**exponent)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 30}"/>'
        )
        parts.append(svg_text(x, height - 16, _power(exponent), "middle"))
    for index, (label, ratio, words, style) in enumerate(rows):
        middle = TOP + pitch * index + pitch / 2
        end = left if ratio is None else place(ratio)
        width = 0.0 if ratio is None else max(2.0, end - left)
        parts.append(svg_text(left - 10, middle + 4, label, "end", "name"))
        hint = f"<title>{escape(label)}: {escape(words)}</title>"
        parts.append(
            f'<rect class="bar {style}" x="{left}" y="{middle - 7:.1f}" '
            f'width="{width:.1f}" height="14">{hint}</rect>'
        )
        parts.append(svg_text(_WIDTH - 4, middle + 4, words, "end"))
    limit = place(1.0)
    parts.append(
        f'<line class="rule" x1="{limit:.1f}" x2="{limit:.1f}" y1="4" y2="{height - 30}"/>'
    )
    parts.append(svg_text(left, height - 2, "max_abs / tolerance", "start"))
    return svg_frame(title, parts, height)


def histogram_plot(edges: Sequence[float], counts: Sequence[int], rule: Rule, *, title: str) -> str:
    """How many values differ by how much: bins of a logarithmic x axis, logarithmic counts."""
    low, high = math.log10(edges[0]), math.log10(edges[-1])
    slots = len(counts)
    most = math.log10(max(*counts, 1)) + 0.3
    floor = f"{place_y(0):.1f}"
    parts = [f'<line class="grid" x1="{LEFT}" x2="{place_x(1):.1f}" y1="{floor}" y2="{floor}"/>']
    for exponent in range(int(most) + 1):
        y = place_y((exponent + 0.3) / (most + 0.3))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{place_x(1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(svg_text(LEFT - 6, y + 4, _power(exponent), "end"))
    width = (place_x(1) - LEFT) / slots
    for index, count in enumerate(counts):
        if not count:
            continue
        top = place_y((math.log10(count) + 0.3) / (most + 0.3))
        style = "bad" if index and edges[index - 1] >= rule.value else "good"
        parts.append(
            f'<rect class="bar {style}" x="{LEFT + index * width + 0.5:.1f}" y="{top:.1f}" '
            f'width="{width - 1:.1f}" height="{place_y(0) - top:.1f}">'
            f"<title>{_bin_name(edges, index)}: {count}</title></rect>"
        )

    def place(value: float) -> float:
        return LEFT + width * (1 + (math.log10(value) - low) / (high - low) * (slots - 2))

    parts += [
        svg_text(place(10.0**exponent), _HEIGHT - 20, _power(exponent), "middle")
        for exponent in range(round(low) + 1, round(high) + 1, 2)
    ]
    parts.append(svg_text(LEFT, _HEIGHT - 20, "0", "start"))
    parts.append(svg_text(place_x(1), _HEIGHT - 4, "|bundle - PyTorch| of a logit", "end"))
    x = place(rule.value)
    parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{place_y(0):.1f}"/>')
    parts.append(svg_text(x + 5, TOP + 8, rule.label, "start", "limit"))
    return svg_frame(title, parts)


def _bin_name(edges: Sequence[float], index: int) -> str:
    if index == 0:
        return f"below {edges[0]:.1e}"
    if index == len(edges):
        return f"{edges[-1]:.1e} or more"
    return f"{edges[index - 1]:.1e} to {edges[index]:.1e}"


def place_x(fraction: float) -> float:
    """Where a fraction of the x axis lies."""
    return LEFT + fraction * (_WIDTH - LEFT - _RIGHT)


def place_y(fraction: float) -> float:
    """Where a fraction of the y axis lies; SVG counts downwards."""
    return TOP + (1 - fraction) * (_HEIGHT - TOP - _BOTTOM)


def _y_grid(axis: _LogAxis) -> str:
    parts = []
    for exponent in axis.ticks():
        y = place_y(axis.fraction(10.0**exponent))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{place_x(1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(svg_text(LEFT - 6, y + 4, axis.name(exponent), "end"))
    return "".join(parts)


def _x_labels(last: int) -> str:
    pitch = max(1, math.ceil(last / 8 / 4) * 4) if last > 8 else 1
    marks = [*range(0, last + 1, pitch)]
    parts = [
        svg_text(place_x(mark / last if last else 0.5), _HEIGHT - 20, str(mark), "middle")
        for mark in marks
    ]
    return "".join([*parts, svg_text(place_x(1), _HEIGHT - 4, "generated step", "end")])


def _line(series: Series, axis: _LogAxis, last: int) -> str:
    """Runs of points joined by lines; a step without a number breaks the line."""
    marks: list[str] = []
    runs: list[list[str]] = [[]]
    for step, value in series.points:
        x = place_x(step / last if last else 0.5)
        hint = f"<title>{escape(series.label)}, step {step}: "
        if value is None:
            runs.append([])
            cross = f"M{x - 4:.1f} {TOP}l8 8m0 -8l-8 8"
            marks.append(f'<path class="cross" d="{cross}">{hint}no number</title></path>')
            continue
        y = place_y(axis.fraction(value))
        runs[-1].append(f"{x:.1f},{y:.1f}")
        dot = f'<circle class="{series.style}" cx="{x:.1f}" cy="{y:.1f}" r="2">'
        marks.append(f"{dot}{hint}{value:.3g}</title></circle>")
    lines = [f'<polyline class="{series.style}" points="{" ".join(run)}"/>' for run in runs if run]
    return "".join([*lines, *marks])


def rule_line(y: float, label: str) -> str:
    """A horizontal line at a limit."""
    line = f'<line class="rule" x1="{LEFT}" x2="{place_x(1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + svg_text(place_x(1), y - 5 if y > TOP + 16 else y + 13, label, "end", "limit")


def svg_text(x: float, y: float, words: str, anchor: str, style: str = "tick") -> str:
    """Words at a place; anchor is "start", "middle" or "end"."""
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"1e{exponent}"


def svg_frame(title: str, parts: Sequence[str], height: float = _HEIGHT) -> str:
    """The whole plot."""
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg>"
    )
