"""`vlmport load`: how does a Triton server answer under load?"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from vlmport.cli.client import ModelOption, TimeoutOption, UrlArgument
from vlmport.cli.progress import RichProgress
from vlmport.cli.report_files import check_is_writable
from vlmport.cli.request_options import ImageOption, MaxNewTokensOption, PromptOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.runtime.request import Request

__all__ = ["load_command"]

Number = TypeVar("Number", int, float)

_DEFAULT_SECONDS = 30.0


def load_command(
    url: UrlArgument,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Requests, one JSON object a line; they are sent in turn."
        ),
    ] = None,
    image: ImageOption = None,
    prompt: PromptOption = None,
    model: ModelOption = "vlm",
    max_new_tokens: MaxNewTokensOption = None,
    clients: Annotated[
        str,
        typer.Option(
            metavar="N,...", help="Clients that each wait for their answer; 1,4,16 if no --rate."
        ),
    ] = "",
    rate: Annotated[
        str,
        typer.Option(metavar="R,...", help="Requests a second, at random times, that do not wait."),
    ] = "",
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Requests of each point.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.001,
            help=f"Seconds of each point; {_DEFAULT_SECONDS:g} if no --count.",
        ),
    ] = None,
    warm_up: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests of each client before it counts.")
    ] = 1,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the times of --rate.")] = 0,
    timeout: TimeoutOption = 600.0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write every request with its times as JSON."),
    ] = None,
) -> None:
    """Measure how a [bold]Triton server[/bold] answers under load.

    Time to first token, between tokens and to the end, as percentiles, and
    requests and tokens a second, for each number of clients and each rate.

    [dim]$[/dim] vlmport load [cyan]HOST:8001[/cyan] --requests questions.jsonl --clients 1,4,16
    """
    if (prompt is None) == (requests is None):
        raise typer.BadParameter("give one of them, not both", param_hint="--prompt / --requests")
    if image and requests is not None:
        raise typer.BadParameter("a file of requests names its own", param_hint="--image")
    check_is_writable(json_file)
    rates = _numbers(rate, "--rate", float)
    from vlmport.api.load import LoadOptions, load
    from vlmport.api.load_render import print_load
    from vlmport.api.load_report import load_json

    options = LoadOptions(
        url=url,
        requests=_requests(requests, prompt, image, max_new_tokens),
        model=model,
        clients=_numbers(clients, "--clients", int) or (() if rates else (1, 4, 16)),
        rates=rates,
        count=count,
        duration_s=_DEFAULT_SECONDS if count is None and duration is None else duration,
        warm_up=warm_up,
        seed=seed,
        timeout_s=timeout,
    )
    with RichProgress() as progress:
        report = load(options, progress)
    from rich.console import Console

    print_load(report, Console(width=None if sys.stdout.isatty() else 120))
    if json_file is not None:
        json_file.write_text(load_json(report), encoding="utf-8")


def _requests(
    file: Path | None, prompt: str | None, images: list[Path] | None, most_tokens: int | None
) -> tuple[Request, ...]:
    from vlmport.api.load_requests import read_requests
    from vlmport.runtime.request import Request

    if file is None:
        return (Request(prompt=prompt, images=tuple(images or ()), max_new_tokens=most_tokens),)

    found = read_requests(file)
    if most_tokens is None:
        return found
    return tuple(dataclasses.replace(request, max_new_tokens=most_tokens) for request in found)


def _numbers(words: str, option: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(dict.fromkeys(kind(word) for word in words.split(",") if word.strip()))
    except ValueError as error:
        msg = f"found {words!r}; expected numbers joined by commas"
        raise typer.BadParameter(msg, param_hint=option) from error
