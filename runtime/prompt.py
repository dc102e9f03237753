"""Turns a chat into token ids with places for image features."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import InputError
from vlmport.runtime.chat_template import compile_template
from vlmport.runtime.located_text import located_ids, named_token
from vlmport.runtime.messages import ImagePart, TextPart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from vlmport.contract import ImageTokens, PromptFormat, SpecialTokens
    from vlmport.runtime.messages import Message
    from vlmport.runtime.preprocessing.prepared import ImageLayout

__all__ = [
    "EncodedPrompt",
    "PromptEncoder",
    "image_text",
    "num_image_tokens",
]


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
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: PromptFormat, special_tokens: SpecialTokens
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._special = special_tokens
        self._template = compile_template(prompt.chat_template)

    def encode(
        self, messages: tuple[Message, ...], layouts: Sequence[ImageLayout]
    ) -> EncodedPrompt:
        """Renders a chat up to the answer and tokenizes it.

        Args:
            messages: a chat.
            layouts: one for each image part.

        Raises:
            InputError: if there are no messages, the template refuses them, or text of theirs
                contains the image placeholder.
        """
        placeholder = self._prompt.image_placeholder
        for message in messages:
            _check_text(message, placeholder)
        text = self._render(messages)
        pieces = text.split(placeholder)
        if len(pieces) - 1 != len(layouts):
            msg = (
                f"messages: the prompt form placed {len(pieces) - 1} of {len(layouts)} images; "
                "put images into user messages"
            )
            raise InputError(msg)
        ids = self._tokenized(pieces, layouts)
        places = ids.count(None)
        expected = sum(num_image_tokens(self._prompt.image_tokens, layout) for layout in layouts)
        if places != expected:
            token = self._prompt.image_tokens.token
            msg = (
                f"messages: the tokenizer made {places} image tokens of {len(layouts)} images; "
                f"expected {expected}; {token!r} is not the image token of the bundle's tokenizer, "
                "or text was read as it; export the bundle again"
            )
            raise InputError(msg)
        mask = np.array([token is None for token in ids], np.bool_)
        filler = self._special.image_token_id or 0
        input_ids = np.array([filler if token is None else token for token in ids], np.int64)
        if not len(input_ids):
            msg = "messages: the rendered prompt is empty; give it some text"
            raise InputError(msg)
        return EncodedPrompt(text, input_ids, mask, len(layouts))

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

    def _tokenized(self, pieces: list[str], layouts: Sequence[ImageLayout]) -> list[int | None]:
        if self._prompt.tokenization == "chunks":
            return self._chunks(pieces, layouts)
        if self._prompt.tokenization == "image_first" and layouts:
            return self._image_first(pieces, layouts)
        return self._whole(pieces, layouts)

    def _image_first(self, pieces: list[str], layouts: Sequence[ImageLayout]) -> list[int | None]:
        form, bos_token = self._prompt.image_tokens, self._special.bos_token
        if pieces[0] or not pieces[1].startswith(bos_token):
            msg = (
                "messages: the prompt form does not begin with an image and the "
                "beginning-of-sequence token; export the bundle again"
            )
            raise InputError(msg)
        text = pieces[1].removeprefix(bos_token)
        for layout, piece in zip(layouts[1:], pieces[2:], strict=True):
            text += image_text(form, layout) + piece
        ids = self._first_image(layouts[0])
        if self._prompt.coordinates is None:
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids += located_ids(self._tokenizer, text, self._prompt.coordinates, layouts)
        image_token = self._special.image_token_id
        return [None if token == image_token else token for token in ids]

    def _first_image(self, layout: ImageLayout) -> list[int | None]:
        """By name, since a tokenizer may begin every text with "▁", which has no place here."""
        form = self._prompt.image_tokens
        before, after = (
            [named_token(self._tokenizer, text)] if text else []
            for text in (form.before, form.after)
        )
        tokens = num_image_tokens(form, replace(layout, rows=1))
        row = [*before, *[None] * tokens, *after]
        return [*row * layout.rows, self._special.bos_token_id]

    def _chunks(self, pieces: list[str], layouts: Sequence[ImageLayout]) -> list[int | None]:
        ids: list[int | None] = []
        has_bos = False
        for index, piece in enumerate(pieces):
            chunk = self._ids(piece)
            starts_with_bos = chunk[:1] == [self._special.bos_token_id]
            if index:
                ids += [None] * num_image_tokens(self._prompt.image_tokens, layouts[index - 1])
                # Factory's rule: later chunks lose it only if the first one has it. Without one
                # (Phi), <|endoftext|> at a chunk's start is text of the chat.
                chunk = chunk[1:] if has_bos and starts_with_bos else chunk
            else:
                has_bos = starts_with_bos
            ids += chunk
        return ids

    def _whole(self, pieces: list[str], layouts: Sequence[ImageLayout]) -> list[int | None]:
        form = self._prompt.image_tokens
        text = pieces[0]
        for layout, piece in zip(layouts, pieces[1:], strict=True):
            text += image_text(form, layout) + piece
        if form.merged:
            text = text.replace(form.merged * 2, form.merged)
        if form.merged_is_spaced:
            text = re.sub(rf"{re.escape(form.merged)}(?=[^\s<])", f"{form.merged} ", text)
        image_token = self._special.image_token_id
        return [None if token == image_token else token for token in self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=self._prompt.add_special_tokens)
        return encoding.ids


def num_image_tokens(form: ImageTokens, layout: ImageLayout) -> int:
    """Embeddings that an image takes in the prompt."""
    if form.kind == "rows":
        return form.count * layout.rows * layout.columns
    return form.count * layout.tiles


def image_text(form: ImageTokens, layout: ImageLayout) -> str:
    """What stands in the prompt for an image, before tokenization."""
    if form.kind == "rows":
        return (form.before + form.token * (form.count * layout.columns) + form.after) * layout.rows
    return (form.before + form.token * form.count + form.after) * layout.tiles


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


def _as_dict(message: Message) -> dict[str, object]:
    content = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
    return {"role": message.role, "content": content}
