"""Finds the first graph, and in it the first layer, at which a backend leaves tolerance.

Every graph gets the reference's own inputs, so that a graph is not blamed for what comes before it.
Of the first graph that is out of tolerance, all inner values are made outputs, in groups that fit
into memory, on both sides. A backend that fuses layers may compute other numbers when their inner
values are asked for: if no value is out of tolerance then, values are marked one at a time, at the
middle of what is left.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlmport.api.bisect_deviation import Deviation, deviation
from vlmport.api.bisect_report import (
    BISECT_SCHEMA_VERSION,
    BisectReport,
    FirstFault,
    GraphCheck,
)
from vlmport.api.bisect_values import in_groups
from vlmport.api.tolerances import inner_tolerance, tolerance_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from vlmport.api.bisect_values import InnerValue
    from vlmport.api.progress import Progress
    from vlmport.api.tolerances import Tolerance

    Feed = Mapping[str, NDArray[Any]]

__all__ = ["BisectCase", "GraphRun", "Side", "bisect"]

DECODER, LOGITS = "decoder", "logits"
# Elements of all inner values of one group, on each side: 512 MiB in float32.
_MOST_ELEMENTS = 1 << 27


class GraphRun(Protocol):
    """An opened graph."""

    def run(self, names: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """The values of these names, each an output or one of those that it was opened with."""
        ...


class Side(Protocol):
    """Runs graphs of a bundle that also give out inner values.

    Attributes:
        name: of what computes, for people.
    """

    name: str

    def open(self, graph: str, values: Sequence[str]) -> AbstractContextManager[GraphRun]:
        """Opens a graph with further values as outputs; those that it has not are passed over."""
        ...

    def known(self, graph: str, values: Sequence[str]) -> tuple[str, ...]:
        """Which of these values it can give out."""
        ...


class BisectCase(Protocol):
    """What is searched.

    Attributes:
        bundle: its folder.
        precision: element type that the graphs compute in.
        graphs: their names, in the order in which they run.
    """

    bundle: str
    precision: str
    graphs: tuple[str, ...]

    def outputs(self, graph: str) -> Sequence[str]:
        """Names of the graph's outputs."""
        ...

    def values(self, graph: str) -> Sequence[InnerValue]:
        """What can be looked at inside of a graph."""
        ...

    def axes(self, graph: str, feed: Feed) -> Mapping[str, int]:
        """Lengths of the named axes of the graph's inputs."""
        ...

    def feeds(self, graph: str) -> Iterable[tuple[str, Feed]]:
        """(What it is, the reference's inputs) of each run of a graph."""
        ...


@dataclass(slots=True)
class _Opened:
    """A variant of one graph, opened on every side."""

    candidate: GraphRun
    reference: GraphRun
    exact: GraphRun | None

    def judge(
        self, names: Sequence[str], feed: Feed, rows: Mapping[str, Tolerance]
    ) -> dict[str, Deviation]:
        """Runs all sides; name -> deviation, in the order of `names`."""
        theirs = self.reference.run(names, feed)
        exact = [None] * len(names) if self.exact is None else self.exact.run(names, feed)
        ours = self.candidate.run(names, feed)
        return {
            name: deviation(mine, other, wide, rows[name])
            for name, mine, other, wide in zip(names, ours, theirs, exact, strict=True)
        }


@dataclass(slots=True)
class _Search:
    """Three sides and what has been opened of them.

    Attributes:
        exact: computes in float32; None where the reference does.
        builds: variants with inner values that were opened.
    """

    case: BisectCase
    candidate: Side
    reference: Side
    exact: Side | None
    progress: Progress
    builds: int = field(default=0)

    def check(self, graph: str) -> tuple[GraphCheck, Feed | None]:
        """Judges a graph's outputs up to the first feed that is out of tolerance, and that feed."""
        names = list(self.case.outputs(graph))
        rows = {name: self._row(graph, name) for name in names}
        check = GraphCheck(graph, 0, 0.0, "", "", "")
        with self._opened(graph, ()) as opened:
            for runs, (label, feed) in enumerate(self.case.feeds(graph), 1):
                found = opened.judge(names, feed, rows)
                self.progress.advance(1)
                output, seen = max(found.items(), key=lambda item: item[1].ratio)
                is_worse = not check.output or seen.ratio > (check.ratio or 0.0)
                ratio = _finite(seen.ratio)
                check = (
                    GraphCheck(graph, runs, ratio, output, label, seen.words)
                    if is_worse
                    else replace(check, runs=runs)
                )
                if seen.is_fault:
                    return check, feed  # the first one is searched; others need not be run
        return check, None

    def locate(self, graph: str, feed: Feed) -> FirstFault:
        """The first value of a faulty graph that is out of tolerance on a feed."""
        values = self._values(graph)
        ratios: dict[str, float] = {}
        for group in in_groups(values, self.case.axes(graph, feed), _MOST_ELEMENTS):
            found = self._judge(graph, group, feed)
            ratios |= {name: one.ratio for name, one in found.items()}
            wrong = [value for value in group if found[value.name].is_fault]
            if wrong:
                first = wrong[0]
                read = [ratios.get(name, 0.0) for name in first.sources]
                return _fault(
                    graph, first, found[first.name], max(read, default=0.0), len(wrong) - 1
                )
        return self._halve(graph, values, feed)

    def _halve(self, graph: str, values: Sequence[InnerValue], feed: Feed) -> FirstFault:
        """Marks one value at a time; the fault is somewhere behind `low` and not behind `high`."""
        outputs = [value for value in values if value.is_output]
        found = self._judge(graph, outputs, feed)
        # Without any mark the graph is as it was, and some output is out of tolerance.
        wrong = [value for value in outputs if found[value.name].is_fault]
        first = wrong[0] if wrong else max(outputs, key=lambda value: found[value.name].ratio)
        low, high, seen = -1, values.index(first), found[first.name]
        while high - low > 1:
            middle = (low + high) // 2
            value = values[middle]
            deviation_there = self._judge(graph, (value,), feed)[value.name]
            if deviation_there.is_fault:
                high, seen = middle, deviation_there
            else:
                low = middle
        after = values[low].name if low >= 0 else ""
        return _fault(graph, values[high], seen, 0.0, 0, found="alone", after=after)

    def _judge(self, graph: str, values: Sequence[InnerValue], feed: Feed) -> dict[str, Deviation]:
        names = [value.name for value in values]
        marked = [value.name for value in values if not value.is_output]
        self.builds += bool(marked)
        with self._opened(graph, marked) as opened:
            found = opened.judge(names, feed, {name: self._row(graph, name) for name in names})
        self.progress.advance(1)
        return found

    @contextlib.contextmanager
    def _opened(self, graph: str, values: Sequence[str]) -> Iterator[_Opened]:
        with contextlib.ExitStack() as stack:
            exact = None
            if self.exact is not None:
                exact = stack.enter_context(self.exact.open(graph, values))
            yield _Opened(
                stack.enter_context(self.candidate.open(graph, values)),
                stack.enter_context(self.reference.open(graph, values)),
                exact,
            )

    def _values(self, graph: str) -> tuple[InnerValue, ...]:
        """Those that every side can give out."""
        values = self.case.values(graph)
        names = [value.name for value in values]
        sides = [side for side in (self.candidate, self.reference, self.exact) if side]
        known = set(names).intersection(*(side.known(graph, names) for side in sides))
        return tuple(value for value in values if value.name in known)

    def _row(self, graph: str, name: str) -> Tolerance:
        precision = self.case.precision
        if graph == DECODER:  # its other outputs are the cache, that of every layer
            is_judged = name == LOGITS
            return tolerance_for(LOGITS, precision) if is_judged else inner_tolerance(precision)
        if name in self.case.outputs(graph):
            return tolerance_for(graph, precision)
        return inner_tolerance(precision)


def _finite(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None


def _fault(
    graph: str,
    value: InnerValue,
    seen: Deviation,
    sources_ratio: float,
    later: int,
    *,
    found: Literal["marked", "alone"] = "marked",
    after: str = "",
) -> FirstFault:
    return FirstFault(
        graph=graph,
        node=value.node,
        operator=value.operator,
        module=value.module,
        value=value.name,
        shape=seen.shape,
        ratio=_finite(seen.ratio),
        words=seen.words,
        sources_ratio=sources_ratio,
        later=later,
        found=found,
        after=after,
    )


def bisect(
    case: BisectCase,
    candidate: Side,
    reference: Side,
    exact: Side | None,
    progress: Progress,
) -> BisectReport:
    """Compares every graph and looks into the first one that is out of tolerance.

    Args:
        case: the bundle and its inputs.
        candidate: the backend that is searched.
        reference: what it is compared with, in the same precision.
        exact: the same graphs in float32; needed where the precision is another.
        progress: is told of every run.
    """
    search = _Search(case, candidate, reference, exact, progress)
    checks, first = [], None
    for graph in case.graphs:
        progress.start(f"comparing {graph}")
        check, feed = search.check(graph)
        checks.append(check)
        if feed is not None and first is None:
            progress.start(f"searching {graph}")
            first = search.locate(graph, feed)
    progress.finish()
    return BisectReport(
        schema_version=BISECT_SCHEMA_VERSION,
        bundle=case.bundle,
        candidate=candidate.name,
        reference=reference.name,
        precision=case.precision,
        graphs=tuple(checks),
        first_fault=first,
        builds=search.builds,
    )
