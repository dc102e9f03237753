"""A request of Triton -> a request of vlmport."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmport.errors import InputError
from vlmport.runtime.messages import ImagePart, parse_messages
from vlmport.runtime.request import Request
from vlmport.runtime.triton_model.parameters import read_parameters
from vlmport.runtime.triton_model.pictures import encoded_picture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from vlmport.runtime.messages import Message
    from vlmport.runtime.triton_model.python_backend import InferenceRequest

__all__ = ["Call", "read_call"]


@dataclass(frozen=True, slots=True)
class Call:
    """What a client asks for.

    Attributes:
        request: the question.
        is_streaming: whether the answer is sent piece by piece, or whole.
        priority: requests of a smaller one are begun first.
        timeout_s: seconds within which the answer must be complete; None for no limit.
    """

    request: Request
    is_streaming: bool
    priority: int
    timeout_s: float | None


def read_call(incoming: InferenceRequest) -> Call:
    """Reads inputs and parameters; nothing of Triton's memory is kept.

    Raises:
        InputError: if one of them cannot be used.
    """
    arrays = {tensor.name(): tensor.as_numpy() for tensor in incoming.inputs()}
    parameters = read_parameters(incoming.parameters(), incoming.timeout())
    prompt, chat = _one_text("text_input", arrays), _one_text("messages", arrays)
    if (prompt is None) == (chat is None):
        found = "neither" if prompt is None else "both"
        msg = f"inputs: found {found} of text_input and messages; give exactly one of them"
        raise InputError(msg)
    images = _items("image", arrays)
    request = Request(
        prompt=prompt,
        messages=None if chat is None else _messages(chat),
        # Never a text: a request's text would be the path of a file on the server.
        images=tuple(
            encoded_picture(value, f"image {number}") for number, value in enumerate(images, 1)
        ),
        max_new_tokens=parameters.max_tokens,
        sampling=parameters.sampling,
        stop_strings=tuple(_text("stop", value) for value in _items("stop", arrays)),
    )
    stream = arrays.get("stream")
    return Call(
        request=request,
        is_streaming=stream is not None and bool(stream.reshape(-1)[0]),
        priority=parameters.priority,
        timeout_s=parameters.timeout_s,
    )


def _messages(text: str) -> tuple[Message, ...]:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"messages: not valid JSON ({error}); expected a list") from error
    messages = parse_messages(value)
    parts = [part for message in messages for part in message.content]
    if any(isinstance(part, ImagePart) and part.path is not None for part in parts):
        msg = (
            'messages: found an image part with "path"; a server opens no files; leave "path" out '
            "and give the pictures as the input image, in their order"
        )
        raise InputError(msg)
    return messages


def _one_text(name: str, arrays: Mapping[str, NDArray[Any]]) -> str | None:
    items = _items(name, arrays)
    return _text(name, items[0]) if items else None


def _items(name: str, arrays: Mapping[str, NDArray[Any]]) -> list[bytes]:
    array = arrays.get(name)
    return [] if array is None else [bytes(value) for value in array.reshape(-1)]


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 ({error}); send text as UTF-8") from error
