"""The options of a request and the chat's file; `generate` and `client` have them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.errors import InputError

if TYPE_CHECKING:
    from vlmport.runtime.messages import Message

__all__ = [
    "FrequencyPenaltyOption",
    "ImageOption",
    "MaxNewTokensOption",
    "MessagesOption",
    "MinPOption",
    "PresencePenaltyOption",
    "PromptOption",
    "RepetitionPenaltyOption",
    "SeedOption",
    "StopOption",
    "TemperatureOption",
    "TopKOption",
    "TopPOption",
    "chat_and_images",
]

_SAMPLING = "Sampling"

ImageOption = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="PATH", help="A picture; repeat it for more, in their order."),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="The question: one turn of the user.")
]
MessagesOption = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        help="Instead of --prompt: a chat, as a JSON list of role and content parts.",
    ),
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", metavar="N", help="Most tokens of the answer."),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="A text that ends the answer; repeat it for more."),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        metavar="T",
        rich_help_panel=_SAMPLING,
        help="0 is greedy: always the likeliest token.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed", metavar="S", rich_help_panel=_SAMPLING, help="Makes sampling repeatable."
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(
        "--top-k",
        metavar="K",
        rich_help_panel=_SAMPLING,
        help="Keep the K likeliest tokens; 0 keeps all.",
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="P",
        rich_help_panel=_SAMPLING,
        help="Keep the likeliest tokens that together reach probability P.",
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        "--min-p",
        metavar="P",
        rich_help_panel=_SAMPLING,
        help="Keep tokens with at least P times the probability of the likeliest.",
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        rich_help_panel=_SAMPLING,
        help="Above 1: against tokens seen before.",
    ),
]
FrequencyPenaltyOption = Annotated[
    float,
    typer.Option(
        "--frequency-penalty",
        metavar="X",
        rich_help_panel=_SAMPLING,
        help="Subtracted from a logit for each time that the answer has the token.",
    ),
]
PresencePenaltyOption = Annotated[
    float,
    typer.Option(
        "--presence-penalty",
        metavar="X",
        rich_help_panel=_SAMPLING,
        help="Subtracted from a logit once if the answer has the token.",
    ),
]


def chat_and_images(
    prompt: str | None, messages: Path | None, images: list[Path] | None
) -> tuple[tuple[Message, ...] | None, tuple[Path, ...]]:
    """The chat, None if there is a prompt, and the pictures in the order of its image parts.

    A part with a path of its own, relative to the folder of the chat's file, takes that; the others
    take those given with --image. The runtime tells if there are too many or too few.

    Raises:
        typer.BadParameter: unless exactly one of prompt and messages is given.
        InputError: if the chat's file cannot be read or is none.
    """
    if (prompt is None) == (messages is None):
        raise typer.BadParameter("give one of them, not both", param_hint="--prompt / --messages")
    given = tuple(images or ())
    if messages is None:
        return None, given
    chat = _read_messages(messages)
    return chat, _in_order(chat, given, messages.parent)


def _read_messages(path: Path) -> tuple[Message, ...]:
    from vlmport.runtime.messages import parse_messages

    try:
        chat: object = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected a list") from error
    return parse_messages(chat)


def _in_order(chat: tuple[Message, ...], given: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    from vlmport.runtime.messages import ImagePart

    rest = list(given)
    images: list[Path] = []
    for part in (part for message in chat for part in message.content):
        if not isinstance(part, ImagePart):
            continue
        if part.path is not None:
            images.append(folder / part.path)
        elif rest:
            images.append(rest.pop(0))
    return (*images, *rest)
