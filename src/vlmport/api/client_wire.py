"""What goes to a server and what comes back: the tensors and parameters of the main model.

`docs/deploy/triton.md` lists them. Both ways to a server, gRPC and HTTP, carry the same values.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vlmport.errors import InputError, ServerError
from vlmport.runtime.messages import ImagePart
from vlmport.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from PIL import Image

    from vlmport.runtime.messages import Message, TextPart
    from vlmport.runtime.request import Request

__all__ = [
    "AnswerPart",
    "AnswerSource",
    "Connection",
    "ServerDescription",
    "WireRequest",
    "part_of",
    "wire_request",
]


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request as the main model takes it.

    Attributes:
        text_input: one user turn; None if `messages` is given.
        messages: a chat as JSON text, its image parts without path; None if `text_input` is given.
        images: encoded pictures, in the order of their placeholders.
        stop: texts that end the answer.
        parameters: those that differ from what the server takes by itself.
        priority: smaller is served first; 0 is the default.
        timeout_us: microseconds after which the server gives the request up; None for no limit.
    """

    text_input: str | None
    messages: str | None
    images: tuple[bytes, ...]
    stop: tuple[str, ...]
    parameters: Mapping[str, int | float]
    priority: int
    timeout_us: int | None


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """One response of a streamed answer.

    Attributes:
        text: new text; may be "".
        token_ids: new tokens; none in a response that only flushes text.
        finish_reason: "stop" or "length" in the last response, else "".
        prompt_tokens: text and image tokens of the prompt.
        image_tokens: image tokens among them.
        generated_tokens: tokens so far.
        regions: parts of the picture that the answer names, in the last response of a family whose
            answers can; else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    regions: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True, slots=True)
class ServerDescription:
    """The server as it names itself: name and version."""

    name: str
    version: str


class AnswerSource(Protocol):
    """What answers requests in streams."""

    def stream(self, model: str, request: WireRequest) -> AsyncGenerator[AnswerPart]:
        """Asks a model and yields the responses as they come.

        The request is cancelled on the server if the generator is closed before its end.
        """
        ...


class Connection(AnswerSource, Protocol):
    """A way to one server; its errors are `ServerError`s."""

    async def describe(self) -> ServerDescription:
        """Asks the server for its name; fails if it cannot be reached or is not live."""
        ...

    async def models(self) -> dict[str, str]:
        """Name -> state of the models in the server's repository, as "READY" or a fault."""
        ...

    async def is_ready(self, model: str) -> bool:
        """Whether a model takes requests."""
        ...

    async def close(self) -> None:
        """Cancels what is in flight."""
        ...


def wire_request(
    request: Request, *, priority: int = 0, timeout_s: float | None = None
) -> WireRequest:
    """Puts a request into the server's terms; reads pictures that are files.

    Args:
        request: as for a local model.
        priority: smaller is served first.
        timeout_s: after which the server gives the request up; None for no limit.

    Raises:
        InputError: if a picture cannot be read, or the time is none.
    """
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        msg = f"timeout: found {timeout_s:g} s; expected a number of seconds above 0"
        raise InputError(msg)
    defaults = SamplingOptions()
    parameters: dict[str, int | float] = {
        field.name: getattr(request.sampling, field.name)
        for field in dataclasses.fields(SamplingOptions)
        if getattr(request.sampling, field.name) != getattr(defaults, field.name)
    }
    if request.max_new_tokens is not None:
        parameters["max_tokens"] = request.max_new_tokens
    return WireRequest(
        text_input=request.prompt,
        messages=None if request.messages is None else _messages_json(request.messages),
        images=tuple(_encoded(image) for image in request.images),
        stop=request.stop_strings,
        parameters=parameters,
        priority=priority,
        timeout_us=None if timeout_s is None else round(timeout_s * 1e6),
    )


def part_of(values: Mapping[str, Any], where: str) -> AnswerPart:
    """Reads one response.

    Args:
        values: output -> str, int, or list of int.
        where: the server, for the message.

    Raises:
        ServerError: if the model is not one of ours.
    """
    missing = [name for name in ("text_output", "token_ids", "finish_reason") if name not in values]
    if missing:
        msg = (
            f"{where}: the answer has no {', '.join(missing)}; expected a model of `vlmport triton`"
        )
        raise ServerError(msg, "NOT_OURS")
    regions = values.get("regions")
    return AnswerPart(
        text=values["text_output"],
        token_ids=tuple(values["token_ids"]),
        finish_reason=values["finish_reason"],
        prompt_tokens=values.get("prompt_tokens", 0),
        image_tokens=values.get("image_tokens", 0),
        generated_tokens=values.get("generated_tokens", 0),
        regions=tuple(json.loads(regions)) if regions else None,
    )


def _messages_json(messages: tuple[Message, ...]) -> str:
    chat = [
        {"role": message.role, "content": [_part_fields(part) for part in message.content]}
        for message in messages
    ]
    return json.dumps(chat, ensure_ascii=False)


def _part_fields(part: TextPart | ImagePart) -> dict[str, str]:
    if isinstance(part, ImagePart):
        return {"type": "image"}
    return {"type": "text", "text": part.text}


def _encoded(image: str | os.PathLike[str] | bytes | Image.Image) -> bytes:
    """A file as it is; the server decodes it."""
    if isinstance(image, bytes):
        return image
    from PIL import Image

    if isinstance(image, Image.Image):
        target = io.BytesIO()
        image.save(target, "PNG")  # keeps every pixel
        return target.getvalue()
    try:
        with open(image, "rb") as file:
            return file.read()
    except OSError as error:
        msg = f"image: {os.fspath(image)} cannot be read ({error.strerror}); give another file"
        raise InputError(msg) from error
