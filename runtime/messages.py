"""Chats: turns of text and images, from a prompt or from JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from vlmport.errors import InputError

__all__ = [
    "ImagePart",
    "Message",
    "TextPart",
    "count_images",
    "messages_from_prompt",
    "parse_messages",
]

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A place for an image; `path` if the message itself names the file."""

    path: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: tuple[TextPart | ImagePart, ...]


def count_images(messages: tuple[Message, ...]) -> int:
    """Image parts of a chat."""
    return sum(isinstance(part, ImagePart) for message in messages for part in message.content)


def messages_from_prompt(prompt: str, num_images: int, placeholder: str) -> tuple[Message, ...]:
    """One user turn: images first, or where the prompt says.

    Args:
        prompt: text; occurrences of the placeholder say where the images stand.
        num_images: images of the request.
        placeholder: the text that stands for one image.

    Raises:
        InputError: if the prompt has placeholders and their number is not that of the images.
    """
    pieces = prompt.split(placeholder)
    if len(pieces) == 1:
        return (Message("user", (*[ImagePart()] * num_images, TextPart(prompt))),)
    if len(pieces) - 1 != num_images:
        msg = (
            f"prompt: found {len(pieces) - 1} places for images ({placeholder}) and {num_images} "
            "images; give as many images as places, or leave the places out"
        )
        raise InputError(msg)
    content: list[TextPart | ImagePart] = []
    for index, piece in enumerate(pieces):
        content += [ImagePart()] if index else []
        content += [TextPart(piece)] if piece else []
    return (Message("user", tuple(content)),)


def parse_messages(value: object) -> tuple[Message, ...]:
    """Reads a chat from parsed JSON.

    Args:
        value: [{"role": ..., "content": text or [{"type": "text", "text": ...},
            {"type": "image", "path": ...}]}]; "path" may be absent.

    Raises:
        InputError: with every fault at once.
    """
    if not isinstance(value, list) or not value:
        msg = "messages: expected a JSON list of messages with role and content"
        raise InputError(msg)
    faults: list[str] = []
    messages = tuple(
        _message(item, f"messages[{index}]", faults) for index, item in enumerate(value)
    )
    if faults:
        raise InputError("; ".join(faults))
    return messages


def _message(item: object, where: str, faults: list[str]) -> Message:
    fields = _object(item, where, {"role", "content"}, faults)
    role, content = fields.get("role"), fields.get("content")
    if role not in _ROLES:
        faults.append(f"{where}.role: found {role!r}; expected one of {', '.join(_ROLES)}")
    if isinstance(content, str):
        parts: tuple[TextPart | ImagePart, ...] = (TextPart(content),)
    elif isinstance(content, list):
        parts = tuple(
            _part(part, f"{where}.content[{index}]", faults) for index, part in enumerate(content)
        )
    else:
        faults.append(f"{where}.content: expected text or a list of parts")
        parts = ()
    return Message(cast("Any", role), parts)


def _part(item: object, where: str, faults: list[str]) -> TextPart | ImagePart:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "image":
        path = _object(item, where, {"type", "path"}, faults).get("path")
        if path is not None and not isinstance(path, str):
            faults.append(f"{where}.path: expected the path of a file")
        return ImagePart(cast("str | None", path))
    text = _object(item, where, {"type", "text"}, faults).get("text")
    if kind != "text" or not isinstance(text, str):
        faults.append(f'{where}: expected type "text" with a text, or type "image"')
    return TextPart(cast("str", text))


def _object(item: object, where: str, known: set[str], faults: list[str]) -> dict[str, object]:
    if not isinstance(item, dict):
        faults.append(f"{where}: expected an object")
        return {}
    unknown = sorted(str(key) for key in item if key not in known)
    if unknown:
        fault = f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        if "path" in known and not {"url", "image"}.isdisjoint(unknown):
            fault += ' (a picture is a file on this machine, under "path")'
        faults.append(fault)
    return item
