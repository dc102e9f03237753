"""Turns a chat into token ids with places for image features."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
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
        num_images = sum(
            isinstance(part, ImagePart) for message in messages for part in message.content
        )
        for message in messages:
            _check_text(message, placeholder)
        text = self._render(messages)
        pieces = text.split(placeholder)
        if len(pieces) - 1 != num_images:
            msg = (
                f"messages: the prompt form placed {len(pieces) - 1} of {num_images} images; "
                "put images into user messages"
            )
            raise InputError(msg)
        ids = self._chunks(pieces) if self._prompt.tokenization == "chunks" else self._whole(text)
        places = ids.count(None)
        if places != num_images * self._num_image_tokens:
            msg = (
                f"messages: the tokenizer made {places} image tokens of {num_images} images; "
                f"expected {self._num_image_tokens} for each; {placeholder!r} is not the image "
                "token of the bundle's tokenizer, or text was read as it; export the bundle again"
            )
            raise InputError(msg)
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
        except Exception as error:  # a template is a program: also TypeError, OverflowError
            msg = f"messages: the bundle's chat template refuses them ({error})"
            raise InputError(msg) from error

    def _chunks(self, pieces: list[str]) -> list[int | None]:
        ids: list[int | None] = []
        has_bos = False
        for index, piece in enumerate(pieces):
            chunk = self._ids(piece)
            starts_with_bos = chunk[:1] == [self._special.bos_token_id]
            if index:
                ids += [None] * self._num_image_tokens
                # Factory's rule: later chunks lose it only if the first one has it. Without one
                # (Phi), <|endoftext|> at a chunk's start is text of the chat.
                chunk = chunk[1:] if has_bos and starts_with_bos else chunk
            else:
                has_bos = starts_with_bos
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


def _check_text(message: Message, placeholder: str) -> None:
    """Checks that text is Unicode and, parts joined, cannot pass for an image."""
    runs = [""]
    for part in message.content:
        if isinstance(part, ImagePart):
            runs.append("")
        else:
            runs[-1] += part.text
    if any(placeholder in run for run in runs):
        msg = (
            f"messages: the text of a {message.role} message contains {placeholder!r}, "
            "which stands for an image; use an image part"
        )
        raise InputError(msg)
    lone = re.search("[\ud800-\udfff]", "".join(runs))
    if lone is not None:
        msg = (
            f"messages: the text of a {message.role} message contains {lone.group()!r}, half of a "
            "surrogate pair; expected Unicode text"
        )
        raise InputError(msg)


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


def _as_dict(message: Message) -> dict[str, object]:
    content = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
    return {"role": message.role, "content": content}


class _GenerationBlocks(jinja2.ext.Extension):
    """Renders {% generation %} blocks as if the tags were not there.

    In templates of transformers they mark an assistant's words for training.
    """

    tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscore names, as in transformers: they lead out."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _Namespace._check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: str) -> None:
        if name.startswith("_"):
            msg = f"found {name!r} in a namespace; expected no name that begins with an underscore"
            raise jinja2.exceptions.SecurityError(msg)


def _compiled(source: str) -> jinja2.Template:
    """Compiles a chat template in the environment that transformers gives it.

    Source: transformers/utils/chat_template_utils.py (5.23), _cached_compile_jinja_template.
    """

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes what is special in HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        msg = f"chat_template: not a valid template ({error}); export the bundle again"
        raise InputError(msg) from error
