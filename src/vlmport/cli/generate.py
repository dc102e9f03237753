"""`vlmport generate`: a bundle answers a question about pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.cli.answer_fields import answer_fields
from vlmport.cli.backend_options import DEFAULT_BACKEND, BackendOption, EnginesOption
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
from vlmport.errors import InputError

if TYPE_CHECKING:
    from vlmport.runtime import GenerationResult

__all__ = ["generate_command"]


def generate_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder.")],
    image: ImageOption = None,
    prompt: PromptOption = None,
    messages: MessagesOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    stop: StopOption = None,
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
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    frequency_penalty: FrequencyPenaltyOption = 0.0,
    presence_penalty: PresencePenaltyOption = 0.0,
) -> None:
    """Let a [bold]bundle[/bold] answer a question about pictures.

    The answer is printed as it is decoded, or with --json as one object
    when it is complete.

    [dim]$[/dim] vlmport generate [cyan]bundle/[/cyan] --image photo.jpg --prompt "What is this?"
    """
    chat, images = chat_and_images(prompt, messages, image)
    from vlmport.runtime import Piece, Request, SamplingOptions, VisionLanguageModel

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
        **answer_fields(result),
        "backend": result.backend,
        "regions": [region_fields(region) for region in result.regions],
        "faults": result.faults,
    }
    return json.dumps(fields, ensure_ascii=False)
