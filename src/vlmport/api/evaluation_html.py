"""An evaluation as one HTML file: inline CSS, SVG and small pictures, no script, no network."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from vlmport.api.evaluation import is_right
from vlmport.api.evaluation_render import interval, percent
from vlmport.api.evaluation_summary import score_rows
from vlmport.api.evaluation_svg import ScoreBar, WindowLine, score_bars, window_plot
from vlmport.api.report_page import page_environment
from vlmport.errors import InputError
from vlmport.runtime.image_file import load_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.evaluation import Evaluation, ScoredAnswer
    from vlmport.api.perplexity import PerplexityReport

__all__ = ["evaluation_html", "perplexity_html"]

_THUMBNAIL = 96  # pixels
_MOST_FLIPPED = 200
_MOST_WRONG = 60


@dataclass(frozen=True, slots=True)
class _Picture:
    """A thumbnail as a data URI; "" if the picture cannot be opened any more."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class _Item:
    ours: ScoredAnswer
    theirs: ScoredAnswer | None
    pictures: tuple[_Picture, ...]


def evaluation_html(evaluation: Evaluation) -> str:
    """Renders scores, plots and the answers that matter; texts are escaped.

    These are the answers that flipped, or without a bundle to compare with the wrong ones.
    """
    template = page_environment().get_template("evaluation.html.j2")
    rows = score_rows(evaluation)
    names = [evaluation.bundle.bundle, evaluation.against.bundle if evaluation.against else ""]
    groups = [
        [
            ScoreBar(name, score, style)
            for name, score, style in zip(names, row[:2], ("good", "faint"), strict=True)
            if score is not None
        ]
        for row in rows
    ]
    return template.render(
        evaluation=evaluation,
        ours=evaluation.bundle,
        theirs=evaluation.against,
        comparison=evaluation.comparison,
        rows=rows,
        bars=Markup(score_bars(groups, title="Scores of each kind of question")),
        lists=_lists(evaluation),
        percent=percent,
        interval=interval,
    )


def perplexity_html(report: PerplexityReport) -> str:
    """Renders the figures and the perplexity of each window."""
    bundles = [(report.against, "faint"), (report.bundle, "main")]
    lines = [
        WindowLine(one.bundle, tuple(math.exp(nll) for nll in one.window_nll), style)
        for one, style in bundles
        if one is not None
    ]
    plot = window_plot(lines, title="Perplexity of each window")
    template = page_environment().get_template("perplexity.html.j2")
    return template.render(report=report, windows=Markup(plot))


def _lists(evaluation: Evaluation) -> list[tuple[str, list[_Item], int]]:
    """(title, answers to be shown, how many are left out)."""
    comparison = evaluation.comparison
    if comparison is None:
        answers = evaluation.bundle.answers
        wrong = [place for place, answer in enumerate(answers) if not is_right(answer.score)]
        return [_list(f"{len(wrong)} wrong answers", wrong, _MOST_WRONG, evaluation)]
    lost, gained = comparison.lost, comparison.gained
    return [
        _list(f"{len(lost)} lost: right in the other alone", lost, _MOST_FLIPPED, evaluation),
        _list(f"{len(gained)} gained: right in this alone", gained, _MOST_FLIPPED, evaluation),
    ]


def _list(
    title: str, places: Sequence[int], most: int, evaluation: Evaluation
) -> tuple[str, list[_Item], int]:
    against = evaluation.against
    items = []
    for place in places[:most]:
        ours = evaluation.bundle.answers[place]
        theirs = against.answers[place] if against is not None else None
        items.append(_Item(ours, theirs, tuple(_picture(Path(path)) for path in ours.images)))
    return title, items, max(0, len(places) - most)


def _picture(path: Path) -> _Picture:
    try:
        image = load_image(path)
    except InputError:  # it was readable when it was asked about; the report goes on without it
        return _Picture(path.name, "")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return _Picture(
        path.name, f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    )
