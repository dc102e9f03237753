"""Turns a chat into token ids with places for image features."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import jinja2
import jinja2.sandbox
import numpy as np

from vlmport.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from vlmport.contract import PromptFormat, SpecialTokens

__all__ = [
    "EncodedPrompt",
    "ImagePart",
    "Message",
    "PromptEncoder",
    "TextPart",
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


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt that is ready to be embedded.

    Attributes:
        text: as rendered by the chat template.
        input_ids: int64 [sequence_length].
        image_mask: bool [sequence_length], True where an image feature takes the embedding's place.
        num_images: images that the prompt has places for.
    """

    text: str
    input_ids: NDArray[np.int64]
    image_mask: NDArray[np.bool_]
    num_images: int

    @property
    def image_tokens(self) -> int:
        """Tokens that images take."""
        return int(self.image_mask.sum())

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """The token ids that are text: int64 [prompt_tokens - image_tokens]."""
        return self.input_ids[~self.image_mask]


class PromptEncoder:
    """Renders and tokenizes chats for one bundle.

    Args:
        tokenizer: the bundle's.
        prompt: prompt form.
        special_tokens: ids with a meaning.
        num_image_tokens: tokens that one image becomes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: PromptFormat,
        special_tokens: SpecialTokens,
        num_image_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._special = special_tokens
        self._num_image_tokens = num_image_tokens
        self._template = _compiled(prompt.chat_template)

    def encode(self, messages: tuple[Message, ...]) -> EncodedPrompt:
        """Renders a chat up to the answer and tokenizes it.

        Raises:
            InputError: if there are no messages, the template refuses them, or text of theirs
                contains the image placeholder.
        """
        placeholder = self._prompt.image_placeholder
        num_images = 0
        for message in messages:
            for part in message.content:
                num_images += isinstance(part, ImagePart)
                if isinstance(part, TextPart) and placeholder in part.text:
                    msg = (
                        f"messages: the text of a {message.role} message contains {placeholder!r}, "
                        "which stands for an image; use an image part"
                    )
                    raise InputError(msg)
        text = self._render(messages)
        pieces = text.split(placeholder)
        if len(pieces) - 1 != num_images:
            msg = (
                f"messages: the prompt form placed {len(pieces) - 1} of {num_images} images; "
                "put images into user messages"
            )
            raise InputError(msg)
        ids = self._chunks(pieces) if self._prompt.tokenization == "chunks" else self._whole(text)
        mask = np.array([token is None for token in ids], np.bool_)
        filler = self._special.image_token_id or 0
        input_ids = np.array([filler if token is None else token for token in ids], np.int64)
        if not len(input_ids):
            msg = "messages: the rendered prompt is empty; give it some text"
            raise InputError(msg)
        return EncodedPrompt(text, input_ids, mask, num_images)

    def _render(self, messages: tuple[Message, ...]) -> str:
        if not messages:
            msg = "messages: found none; expected at least one"
            raise InputError(msg)
        try:
            return self._template.render(
                messages=[_as_dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._special.bos_token,
                eos_token=self._special.eos_token,
            )
        except jinja2.TemplateError as error:
            msg = f"messages: the bundle's chat template refuses them ({error})"
            raise InputError(msg) from error

    def _chunks(self, pieces: list[str]) -> list[int | None]:
        ids: list[int | None] = []
        for index, piece in enumerate(pieces):
            chunk = self._ids(piece)
            if index:
                ids += [None] * self._num_image_tokens
                if chunk and chunk[0] == self._special.bos_token_id:
                    chunk = chunk[1:]
            ids += chunk
        return ids

    def _whole(self, text: str) -> list[int | None]:
        ids: list[int | None] = []
        for token in self._ids(text):
            is_image = token == self._special.image_token_id
            ids += [None] * self._num_image_tokens if is_image else [token]
        return ids

    def _ids(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=self._prompt.add_special_tokens)
        return encoding.ids


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
        faults.append(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return item


def _as_dict(message: Message) -> dict[str, object]:
    content = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
    return {"role": message.role, "content": content}


def _compiled(source: str) -> jinja2.Template:
    """Compiles a chat template in the environment that transformers gives it."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        msg = f"chat_template: not a valid template ({error}); export the bundle again"
        raise InputError(msg) from error
