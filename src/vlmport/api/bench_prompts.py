"""The prompts of a benchmark: so many pictures, and words up to so many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from vlmport.errors import InputError
from vlmport.runtime.messages import messages_from_prompt
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.prompt import PromptEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.contract import Manifest
    from vlmport.runtime.preprocessing.prepared import ImageLayout
    from vlmport.runtime.prompt import EncodedPrompt

__all__ = ["BenchPrompt", "PromptMaker", "bench_pictures"]

_WORDS = ("the", "picture", "shows", "a", "small", "red", "circle", "and", "one", "blue", "line")
_FILLERS = 8  # one-letter words that bring a prompt nearer to the wanted length
_HEIGHT, _WIDTH = 480, 640


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One user turn that every contender is given: pictures, then words.

    Attributes:
        num_images: of `bench_pictures`.
        text: the words.
        text_tokens_wanted: what the prompt was made for.
        text_tokens: those that it has, the chat's frame included.
        image_tokens: tokens that the pictures take.
        token_ids: of the whole prompt; 0 at image tokens.
    """

    num_images: int
    text: str
    text_tokens_wanted: int
    text_tokens: int
    image_tokens: int
    token_ids: tuple[int, ...]


class PromptMaker:
    """Makes prompts for one bundle; needs its manifest and its tokenizer alone.

    Args:
        folder: of the bundle.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._manifest = manifest
        self._encoder = PromptEncoder(tokenizer, manifest.prompt, manifest.special_tokens)
        self._layouts: dict[int, list[ImageLayout]] = {}

    @property
    def least_images(self) -> int:
        """Pictures that a prompt cannot do without: 0 or 1."""
        try:
            self._encode(0, _WORDS[0])
        except InputError:  # the chat template refuses a prompt without
            return 1
        return 0

    def image_tokens(self, num_images: int) -> int:
        """Tokens that so many pictures take."""
        return self._encode(num_images, _WORDS[0]).image_tokens

    def make(self, num_images: int, text_tokens: int, new_tokens: int) -> BenchPrompt:
        """The longest prompt of at most so many text tokens, but with one word at least.

        Args:
            num_images: pictures.
            text_tokens: wanted, the chat's frame included.
            new_tokens: that the answer will have.

        Raises:
            InputError: if the bundle's max_length leaves no room for prompt and answer.
        """
        low, high = 1, max(1, text_tokens)  # words; a word has a token or more
        while low < high:
            middle = (low + high + 1) // 2
            if self._text_tokens(num_images, _words(middle)) <= text_tokens:
                low = middle
            else:
                high = middle - 1
        text = _words(low)
        for _ in range(_FILLERS):
            if self._text_tokens(num_images, f"{text} a") > text_tokens:
                break
            text += " a"
        encoded = self._encode(num_images, text)
        length, limit = len(encoded.input_ids), self._manifest.dimensions.max_length
        if length + new_tokens > limit:
            msg = (
                f"prompt: {length} tokens and {new_tokens} new ones; the bundle's max_length is "
                f"{limit}; ask for less, or export with a larger --max-length"
            )
            raise InputError(msg)
        ids = tuple(np.where(encoded.image_mask, 0, encoded.input_ids).tolist())
        images = encoded.image_tokens
        return BenchPrompt(num_images, text, text_tokens, length - images, images, ids)

    def _text_tokens(self, num_images: int, text: str) -> int:
        encoded = self._encode(num_images, text)
        return len(encoded.input_ids) + encoded.num_cut - encoded.image_tokens

    def _encode(self, num_images: int, text: str) -> EncodedPrompt:
        if num_images not in self._layouts:
            image, pictures = self._manifest.image, bench_pictures(num_images)
            self._layouts[num_images] = [prepare_image(one, image).layout for one in pictures]
        placeholder = self._manifest.prompt.image_placeholder
        messages = messages_from_prompt(text, num_images, placeholder)
        return self._encoder.encode(messages, self._layouts[num_images])


def bench_pictures(count: int) -> list[Image.Image]:
    """Pictures of noise of 640 x 480 pixels, RGB; the same at every call."""
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (_HEIGHT, _WIDTH, 3), np.uint8))
        for _ in range(count)
    ]


def _words(count: int) -> str:
    return " ".join(islice(cycle(_WORDS), count))
