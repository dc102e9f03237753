"""`vlmport client`: a model on a Triton server answers a question about pictures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.cli.answer_fields import answer_fields
from vlmport.cli.request_options import (
    FrequencyPenaltyOption,
    ImageOption,
    MaxNewTokensOption,
    MessagesOption,
    MinPOption,
    PresencePenaltyOption,
    PromptOption,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    chat_and_images,
)

if TYPE_CHECKING:
    from vlmport.api.client import ServedAnswer
    from vlmport.api.client_wire import AnswerPart

__all__ = ["ModelOption", "TimeoutOption", "UrlArgument", "client_command"]

UrlArgument = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        help="host:port or grpc://host:port of its gRPC port, or http(s)://host:port.",
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="NAME", help="The main model's name on the server.")
]
TimeoutOption = Annotated[
    float,
    typer.Option(
        "--timeout", metavar="S", min=0.001, help="Most seconds for an answer; then it is given up."
    ),
]


def client_command(
    url: UrlArgument,
    image: ImageOption = None,
    prompt: PromptOption = None,
    messages: MessagesOption = None,
    model: ModelOption = "vlm",
    max_new_tokens: MaxNewTokensOption = None,
    stop: StopOption = None,
    timeout: TimeoutOption = 600.0,
    priority: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Smaller is begun first; 0 is the default; over HTTP."
        ),
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")
    ] = False,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    frequency_penalty: FrequencyPenaltyOption = 0.0,
    presence_penalty: PresencePenaltyOption = 0.0,
) -> None:
    """Ask a model on a [bold]Triton server[/bold] that `vlmport triton` made.

    The answer is printed as it comes, or with --json as one object when it is
    complete. Ctrl-C cancels the request on the server.

    [dim]$[/dim] vlmport client [cyan]HOST:8001[/cyan] --image photo.jpg --prompt "What is this?"
    """
    chat, images = chat_and_images(prompt, messages, image)
    from vlmport.api.client import ask
    from vlmport.runtime.request import Request
    from vlmport.runtime.sampling import SamplingOptions

    request = Request(
        prompt=prompt,
        messages=chat,
        images=images,
        max_new_tokens=max_new_tokens,
        stop_strings=tuple(stop or ()),
        sampling=SamplingOptions(
            temperature=temperature,
            seed=seed,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
        ),
    )
    answer = ask(
        url,
        request,
        model=model,
        timeout_s=timeout,
        priority=priority,
        on_part=None if as_json else _show,
    )
    typer.echo(_as_json(answer) if as_json else "")


def _show(part: AnswerPart) -> None:
    typer.echo(part.text, nl=False)


def _as_json(answer: ServedAnswer) -> str:
    """The keys of `vlmport generate --json`, without those that a server does not tell."""
    fields = {
        **answer_fields(answer),
        "regions": answer.regions,
    }
    return json.dumps(fields, ensure_ascii=False)
