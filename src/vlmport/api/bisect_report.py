"""What a search for the first wrong layer of a backend found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BISECT_SCHEMA_VERSION",
    "BisectReport",
    "FirstFault",
    "GraphCheck",
    "bisect_report_json",
    "print_bisect_report",
]

BISECT_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class GraphCheck:
    """One graph, fed with the reference's own inputs.

    Attributes:
        graph: its name.
        runs: how many inputs it was run on.
        ratio: its worst output's difference over what is allowed; None for infinitely more, or NaN
            or Inf on one side alone.
        output: name of that output.
        run: the first run that is out of tolerance, else the worst one.
        words: what is out of tolerance; "" if nothing is.
    """

    graph: str
    runs: int
    ratio: float | None
    output: str
    run: str
    words: str


@dataclass(frozen=True, slots=True)
class FirstFault:
    """The first value, in the order of computation, that is out of tolerance.

    Attributes:
        graph: name of its graph.
        node: name of the ONNX node that computes it.
        operator: the node's.
        module: the PyTorch module that the node came from; "" if that is not known.
        value: its name.
        shape: lengths of its axes.
        ratio: as in `GraphCheck`.
        words: what is out of tolerance.
        sources_ratio: largest ratio of the values that the node reads; 0 if it reads inputs of the
            graph alone.
        later: values behind it that are out of tolerance too, in the same group of values.
        found: "marked": with inner values as outputs. "alone": only while few values are outputs,
            so that layers that TensorRT fuses are suspected; then the node is the last one of
            the stretch that begins behind `after`.
        after: the last value before it that is within tolerance, if found "alone"; "" for the
            inputs of the graph.
    """

    graph: str
    node: str
    operator: str
    module: str
    value: str
    shape: tuple[int, ...]
    ratio: float | None
    words: str
    sources_ratio: float
    later: int
    found: Literal["marked", "alone"]
    after: str


@dataclass(frozen=True, slots=True)
class BisectReport:
    """The result of a search.

    Attributes:
        schema_version: of this structure.
        bundle: its folder.
        candidate: what was searched.
        reference: what it was compared with.
        precision: element type that the graphs compute in.
        graphs: every graph, in the order in which they run.
        first_fault: None if all graphs are within tolerance.
        builds: variants of graphs that were opened with inner values.
    """

    schema_version: int
    bundle: str
    candidate: str
    reference: str
    precision: str
    graphs: tuple[GraphCheck, ...]
    first_fault: FirstFault | None
    builds: int


def bisect_report_json(report: BisectReport) -> str:
    """The report as JSON text."""
    return json.dumps(asdict(report), indent=2, allow_nan=False)


def print_bisect_report(report: BisectReport, console: Console) -> None:
    """Prints a table of the graphs, and the first fault in words."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report.candidate} beside {report.reference}, {report.precision}")
    for heading in ("graph", "runs", "of the tolerance", "worst output", "run"):
        table.add_column(heading)
    for check in report.graphs:
        share = "beyond" if check.ratio is None else f"{check.ratio:.3g}"
        colour = "red" if check.words else "green"
        cells = (check.graph, str(check.runs), f"[{colour}]{share}[/{colour}]")
        table.add_row(*cells, escape(check.output), escape(check.run))
    console.print(table)
    for check in report.graphs:
        if check.words:
            console.print(escape(f"{check.graph}, {check.output}, {check.run}: {check.words}"))
    console.print(escape(_verdict(report)))


def _verdict(report: BisectReport) -> str:
    fault = report.first_fault
    if fault is None:
        return f"No graph is out of tolerance; nothing was searched ({report.candidate})."
    where = f"module {fault.module}" if fault.module else "no module is known"
    if fault.found == "alone":
        after = fault.after or "the inputs of the graph"
        return (
            f"{fault.graph}: out of tolerance only while few values are outputs, so that layers "
            f"which are fused are suspected: those behind {after} up to {fault.operator} "
            f"{fault.node} ({where}), value {fault.value} {list(fault.shape)}: {fault.words}"
        )
    return (
        f"{fault.graph}: first out of tolerance: {fault.operator} {fault.node} ({where}), value "
        f"{fault.value} {list(fault.shape)}: {fault.words}; what it reads is within tolerance "
        f"({fault.sources_ratio:.3g} of it at most); {fault.later} later values are out as well"
    )
