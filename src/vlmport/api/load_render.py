"""Shows a load test on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from vlmport.api.load_report import LoadPoint, LoadReport, Percentiles

__all__ = ["point_name", "print_load"]


def print_load(report: LoadReport, console: Console) -> None:
    """A line about the test, a table of rates, and one of times."""
    machine = report.environment
    server = f"{report.server.name} {report.server.version}".strip()
    head = (
        f"{report.model} on {server} at {report.url}, {report.different_requests} different "
        f"requests; clients on {machine.processor}, {machine.cores} cores"
    )
    console.print(head, markup=False, highlight=False, soft_wrap=True)
    console.print(_rates(report))
    console.print(_times(report))
    for point in report.points:
        for kind, count in point.figures.errors.items():
            first = next(one.error for one in point.requests if one.error_kind == kind)
            console.print(
                Text(f"{point_name(point)}: {count} x {kind}: {first}", style="yellow"),
                soft_wrap=True,
            )


def point_name(point: LoadPoint) -> str:
    """A point in words: "4 clients" or "2.5 requests/s"."""
    if point.clients is None:
        return f"{point.rate:g} requests/s"
    return "1 client" if point.clients == 1 else f"{point.clients} clients"


def _rates(report: LoadReport) -> Table:
    table = Table(box=box.SIMPLE, title="answers", title_justify="left")
    table.add_column("load", no_wrap=True)
    for name in ("requests", "failed", "s", "requests/s", "tokens/s", "in flight"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in report.points:
        found = point.figures
        table.add_row(
            point_name(point),
            str(found.completed + found.failed),
            str(found.failed),
            f"{found.seconds:.1f}",
            f"{found.requests_per_second:.2f}",
            f"{found.tokens_per_second:.1f}",
            f"{found.mean_in_flight:.1f}",
        )
    return table


def _times(report: LoadReport) -> Table:
    table = Table(box=box.SIMPLE, title="milliseconds", title_justify="left")
    table.add_column("load", no_wrap=True)
    table.add_column("of", no_wrap=True)
    for name in ("p50", "p90", "p95", "p99", "most", "values"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in report.points:
        found = point.figures
        rows = [
            ("first token", found.ttft_ms),
            ("between tokens", found.inter_token_ms),
            ("whole answer", found.latency_ms),
        ]
        if point.rate is not None:
            rows.append(("sent too late", found.lateness_ms))
        for index, (name, spread) in enumerate(rows):
            table.add_row(point_name(point) if index == 0 else "", name, *_cells(spread))
    return table


def _cells(spread: Percentiles | None) -> tuple[str, ...]:
    if spread is None:
        return ("-",) * 5 + ("0",)
    values = (spread.p50, spread.p90, spread.p95, spread.p99, spread.most)
    return (*(f"{value:.2f}" for value in values), str(spread.count))
