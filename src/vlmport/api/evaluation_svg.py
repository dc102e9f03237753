"""Bars of scores with their intervals, as SVG; colours come from the page's CSS classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from vlmport.api.parity_svg import svg_frame, svg_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.evaluation import KindScore

__all__ = ["ScoreBar", "WindowLine", "round_step", "score_bars", "window_plot"]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 120, 22, 8, 26
_BAR, _GAP = 12, 12  # height of a bar; space between groups
_PLOT_HEIGHT, _PLOT_LEFT, _PLOT_TOP, _PLOT_BOTTOM = 200, 52, 12, 26
_TICKS = (0, 20, 40, 60, 80, 100)


@dataclass(frozen=True, slots=True)
class ScoreBar:
    """One bar.

    Attributes:
        name: of the bundle, shown while the pointer rests on the bar.
        score: its length and whiskers.
        style: CSS class.
    """

    name: str
    score: KindScore
    style: str


@dataclass(frozen=True, slots=True)
class WindowLine:
    """One line.

    Attributes:
        name: of the bundle, shown while the pointer rests on a point.
        values: one a window, above 0.
        style: CSS class: "main" or "faint".
    """

    name: str
    values: tuple[float, ...]
    style: str


def score_bars(groups: Sequence[Sequence[ScoreBar]], *, title: str) -> str:
    """Horizontal bars from 0 to 100 %, each with its interval.

    Args:
        groups: the bars of one kind of question, drawn close together.
        title: told to screen readers.
    """
    height = _TOP + sum(len(group) * _BAR + _GAP for group in groups) + _BOTTOM
    parts = []
    for tick in _TICKS:
        x = _x(tick / 100)
        parts.append(_line("grid", x, _TOP, x, height - _BOTTOM))
        parts.append(svg_text(x, height - 8, f"{tick} %", "middle"))
    y = _TOP + _GAP / 2
    for group in groups:
        middle = y + len(group) * _BAR / 2
        parts.append(svg_text(_LEFT - 10, middle + 4, group[0].score.kind, "end", "name"))
        for bar in group:
            parts.append(_bar(bar, y))
            y += _BAR
        y += _GAP
    return svg_frame(title, parts, height)


def _bar(bar: ScoreBar, y: float) -> str:
    score = bar.score
    words = f"{bar.name}, {score.kind}: {100 * score.score:.1f} %"
    words += f" ({100 * score.low:.1f} to {100 * score.high:.1f}), {score.count} questions"
    width = _x(score.score) - _LEFT
    rectangle = (
        f'<rect class="bar {bar.style}" x="{_LEFT}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{_BAR - 2}"><title>{escape(words)}</title></rect>'
    )
    middle, low, high = y + _BAR / 2 - 1, _x(score.low), _x(score.high)
    ends = "".join(_line("whisker", x, middle - 3, x, middle + 3) for x in (low, high))
    return rectangle + _line("whisker", low, middle, high, middle) + ends


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def window_plot(lines: Sequence[WindowLine], *, title: str) -> str:
    """Lines of a value over the windows of a text, on an axis from 0.

    Args:
        lines: drawn in this order, so that the last lies on top; one value or more each.
        title: told to screen readers.
    """
    highest = max(max(line.values) for line in lines)
    last = max(len(line.values) for line in lines) - 1
    step = round_step(highest / 4)
    top = step * math.ceil(highest / step)
    parts = []
    for tick in range(round(top / step) + 1):
        y = _plot_y(tick * step / top)
        parts.append(_line("grid", _PLOT_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(svg_text(_PLOT_LEFT - 6, y + 4, f"{tick * step:g}", "end"))
    parts += [_window_line(line, last, top) for line in lines]
    words = f"windows 0 to {last} of the text"
    parts.append(svg_text(_WIDTH - _RIGHT, _PLOT_HEIGHT - 6, words, "end"))
    return svg_frame(title, parts, _PLOT_HEIGHT)


def _window_line(line: WindowLine, last: int, top: float) -> str:
    width = _WIDTH - _RIGHT - _PLOT_LEFT
    marks, path = [], []
    for window, value in enumerate(line.values):
        x = _PLOT_LEFT + width * (window / last if last else 0.5)
        y = _plot_y(value / top)
        path.append(f"{x:.1f},{y:.1f}")
        words = f"{line.name}, window {window}: {value:.4g}"
        marks.append(
            f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2">'
            f"<title>{escape(words)}</title></circle>"
        )
    return f'<polyline class="{line.style}" points="{" ".join(path)}"/>' + "".join(marks)


def _plot_y(fraction: float) -> float:
    return _PLOT_TOP + (1 - fraction) * (_PLOT_HEIGHT - _PLOT_TOP - _PLOT_BOTTOM)


def round_step(wanted: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and 0.1, ...) that is not below."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted)
