"""Shows a benchmark on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vlmport.api.bench_report import BenchReport, Environment, Spread

__all__ = ["environment_words", "mebibytes", "print_bench", "shown_ratio", "shown_spread"]

_MIB = 1 << 20


def print_bench(report: BenchReport, console: Console) -> None:
    """Prints the machine, then a table each for first tokens, decoding and memory."""
    console.print(Text(environment_words(report.environment)), style="dim", soft_wrap=True)
    bandwidth = report.bandwidth
    console.print(
        Text(
            f"memory: {shown_spread(bandwidth.bytes_per_second, 1e-9)} GB/s ({bandwidth.method}), "
            f"{report.rounds} rounds, medians (lowest to highest); "
            "/ bundle: its time / the bundle's in the same round"
        ),
        style="dim",
        soft_wrap=True,
    )
    console.print(_first_tokens(report))
    console.print(_decoding(report))
    console.print(_memory(report))
    for reason, where in _reasons(report).items():
        console.print(Text(f"not run: {', '.join(where)}: {reason}"), soft_wrap=True)
    console.print(
        Text(f"{report.bundle} ({report.variant}, {report.precision})"), style="dim", soft_wrap=True
    )


def environment_words(environment: Environment) -> str:
    """The machine and the versions in one line."""
    words = (
        f"{environment.processor}, {environment.cores} cores, {environment.threads} threads, "
        f"{environment.memory_bytes / (1 << 30):.0f} GiB, load {environment.load_average}"
    )
    if environment.gpu:
        words += (
            f"; {environment.gpu}, {environment.gpu_memory_bytes / (1 << 30):.0f} GiB, driver for "
            f"CUDA {environment.driver}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return f"{words}; {environment.platform}; {versions}"


def shown_spread(spread: Spread | None, factor: float = 1.0) -> str:
    """The median and the ends, in three digits; "" for none."""
    if spread is None:
        return ""
    low, high = _short(spread.low * factor), _short(spread.high * factor)
    return f"{_short(spread.median * factor)} ({low} to {high})"


def shown_ratio(ratio: Spread | None) -> str:
    """The same; "1" for the contender that the others are compared with."""
    return "1" if ratio is not None and set(ratio.samples) == {1.0} else shown_spread(ratio)


def mebibytes(count: int | None) -> str:
    """Bytes in MiB; "" for None."""
    return "" if count is None else f"{count / _MIB:.1f}"


def _short(value: float) -> str:
    """Three digits, and no exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.4f}"


def _first_tokens(report: BenchReport) -> Table:
    table = _table("first token", ("contender",), ("images", "tokens", "ms", "/ bundle"))
    for one in report.first_token:
        tokens = str(one.text_tokens or one.text_tokens_wanted)
        tokens += f" + {one.image_tokens}" if one.image_tokens else ""
        cells = (shown_spread(one.milliseconds) or "not run", shown_ratio(one.ratio))
        table.add_row(Text(one.contender), str(one.images), tokens, *cells)
    return table


def _decoding(report: BenchReport) -> Table:
    with_host = any(one.host_milliseconds for one in report.decode)
    figures = ["batch", "context", "tokens/s", "step ms", "/ bundle", "roofline"]
    if with_host:
        figures.append("host ms a step")
    table = _table("decoding", ("contender",), figures)
    for one in report.decode:
        cells = [
            shown_spread(one.tokens_per_second) or "not run",
            shown_spread(one.step_milliseconds),
            shown_ratio(one.ratio),
            "" if one.roofline_share is None else f"{one.roofline_share.median:.0%}",
        ]
        if with_host:
            cells.append(shown_spread(one.host_milliseconds))
        table.add_row(
            Text(one.contender), str(one.batch), str(one.context or one.context_wanted), *cells
        )
    return table


def _memory(report: BenchReport) -> Table:
    table = _table("memory", ("contender", "computes"), ("peak RSS MiB", "GPU MiB"))
    for one in report.contenders:
        cells = (mebibytes(one.peak_rss_bytes), mebibytes(one.device_bytes))
        table.add_row(Text(one.name), Text(one.computes or "not run"), *cells)
    return table


def _table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in words:
        table.add_column(heading, no_wrap=heading == "contender")
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _reasons(report: BenchReport) -> dict[str, list[str]]:
    """Reason -> where it held, each contender that was not run at all named once."""
    found: dict[str, list[str]] = {}
    absent = {one.name for one in report.contenders if one.reason}
    for contender in report.contenders:
        if contender.reason:
            found.setdefault(contender.reason, []).append(contender.name)
    for first in report.first_token:
        if first.reason and first.contender not in absent:
            where = f"first token of {first.contender} with {first.images} images"
            _add(found, first.reason, f"{where} and {first.text_tokens_wanted} tokens")
    for decode in report.decode:
        if decode.reason and decode.contender not in absent:
            where = f"decoding of {decode.contender} at batch {decode.batch}"
            _add(found, decode.reason, f"{where} and context {decode.context_wanted}")
    return found


def _add(found: dict[str, list[str]], reason: str, where: str) -> None:
    found.setdefault(reason, []).append(where)
