"""`vlmport generate`: a bundle answers a question about pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.cli.backend_options import DEFAULT_BACKEND, BackendOption, EnginesOption
from vlmport.errors import InputError

if TYPE_CHECKING:
    from vlmport.runtime import GenerationResult
    from vlmport.runtime.messages import Message

__all__ = ["generate_command"]

_SAMPLING = "Sampling"


def generate_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A picture; repeat it for more, in their order."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The question: one turn of the user.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of --prompt: a chat, as a JSON list of role and content parts.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of the answer.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text that ends the answer; repeat it for more."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the picture with the boxes and masks of the answer drawn on it.",
        ),
    ] = None,
    backend: BackendOption = DEFAULT_BACKEND,
    engines: EnginesOption = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", rich_help_panel=_SAMPLING, help="0 is greedy: always the likeliest token."
        ),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(metavar="S", rich_help_panel=_SAMPLING, help="Makes sampling repeatable."),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="K", rich_help_panel=_SAMPLING, help="Keep the K likeliest tokens; 0 keeps all."
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            rich_help_panel=_SAMPLING,
            help="Keep the likeliest tokens that together reach probability P.",
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            rich_help_panel=_SAMPLING,
            help="Keep tokens with at least P times the probability of the likeliest.",
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            metavar="X", rich_help_panel=_SAMPLING, help="Above 1: against tokens seen before."
        ),
    ] = 1.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            metavar="X",
            rich_help_panel=_SAMPLING,
            help="Subtracted from a logit for each time that the answer has the token.",
        ),
    ] = 0.0,
    presence_penalty: Annotated[
        float,
        typer.Option(
            metavar="X",
            rich_help_panel=_SAMPLING,
            help="Subtracted from a logit once if the answer has the token.",
        ),
    ] = 0.0,
) -> None:
    """Let a [bold]bundle[/bold] answer a question about pictures.

    The answer is printed as it is decoded, or with --json as one object
    when it is complete.

    [dim]$[/dim] vlmport generate [cyan]bundle/[/cyan] --image photo.jpg --prompt "What is this?"
    """
    if (prompt is None) == (messages is None):
        raise typer.BadParameter("give one of them, not both", param_hint="--prompt / --messages")
    from vlmport.runtime import Piece, Request, SamplingOptions, VisionLanguageModel

    chat, images = None, tuple(image or ())
    if messages is not None:
        chat = _read_messages(messages)
        images = _in_order(chat, images, messages.parent)
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
    model = VisionLanguageModel.load(bundle, backend=backend, engines=engines)
    if draw is not None:
        _check_drawing(draw, images, model.manifest.answers.kind)

    def show(piece: Piece) -> None:
        typer.echo(piece.text, nl=False)

    result = model.generate_batch([request], on_piece=None if as_json else show)[0]
    typer.echo(_as_json(result) if as_json else "")
    for fault in result.faults:
        typer.echo(f"warning: {fault}", err=True)
    if draw is not None:
        _draw(draw, images[0], result)


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
    """Images in the order of the chat's image parts.

    A part with a path of its own, relative to the folder of the chat's file, takes that; the others
    take those given with --image. The runtime tells if there are too many or too few.
    """
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


def _check_drawing(target: Path, images: tuple[Path, ...], answers: str) -> None:
    """Tells before the model runs what would make the drawing impossible."""
    from PIL import Image

    if answers == "text":
        msg = "--draw: this bundle answers with text alone; its answers name no regions to draw"
        raise InputError(msg)
    if len(images) != 1:
        msg = f"--draw: found {len(images)} pictures; expected one to draw on"
        raise InputError(msg)
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        msg = f"{target}: Pillow writes no {target.suffix or 'file without ending'}; try .png"
        raise InputError(msg)
    if not target.parent.is_dir():
        msg = f"{target}: there is no folder {target.parent}; make it first"
        raise InputError(msg)


def _draw(target: Path, picture: Path, result: GenerationResult) -> None:
    from vlmport.runtime.drawing import draw_regions
    from vlmport.runtime.image_file import load_image

    drawn = draw_regions(load_image(picture), result.regions)
    try:
        drawn.save(target)
    except (OSError, ValueError) as error:
        msg = f"{target}: cannot be written ({error}); choose another place or ending"
        raise InputError(msg) from error


def _as_json(result: GenerationResult) -> str:
    from vlmport.runtime.region_fields import region_fields

    fields = {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "image_tokens": result.image_tokens,
        "generated_tokens": result.generated_tokens,
        "finish_reason": result.finish_reason,
        "ttft_ms": round(result.ttft_ms, 3),
        "tokens_per_second": round(result.tokens_per_second, 3),
        "backend": result.backend,
        "regions": [region_fields(region) for region in result.regions],
        "faults": result.faults,
    }
    return json.dumps(fields, ensure_ascii=False)
