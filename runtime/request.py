"""What is asked of a model, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vlmport.errors import InputError
from vlmport.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from vlmport.runtime.image_file import ImageSource
    from vlmport.runtime.messages import Message
    from vlmport.runtime.regions import Region

__all__ = ["GenerationResult", "Piece", "Request"]


@dataclass(frozen=True, slots=True)
class Request:
    """One chat to be answered.

    Attributes:
        prompt: one user turn; or None, if `messages` is given.
        messages: a chat; or None, if `prompt` is given.
        images: paths, encoded pictures as bytes, or Pillow images, in the order of their
            placeholders.
        max_new_tokens: most tokens to generate; None for the bundle's default.
        sampling: how tokens are chosen; greedy by default.
        stop_strings: texts that end the answer, besides the bundle's own.
    """

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    images: tuple[ImageSource, ...] = ()
    max_new_tokens: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        if (self.prompt is None) == (self.messages is None):
            found = "neither" if self.prompt is None else "both"
            msg = f"request: found {found} of prompt and messages; give exactly one of them"
            raise InputError(msg)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            msg = f"max_new_tokens: found {self.max_new_tokens}; expected 1 or more"
            raise InputError(msg)
        if "" in self.stop_strings:
            msg = "stop_strings: found an empty text; leave it out"
            raise InputError(msg)


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of a streamed answer.

    Attributes:
        text: new text, "" while a character or a possible stop string is incomplete.
        token_id: the token of this step; None in the last piece, which only flushes text.
    """

    text: str
    token_id: int | None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer.

    Attributes:
        text: decoded, without special tokens and without the stop string.
        token_ids: generated tokens, the end-of-sequence token included.
        prompt_tokens: text and image tokens of the prompt.
        image_tokens: image tokens among them.
        finish_reason: "stop" at an end-of-sequence token or stop string, "length" at a limit.
        ttft_ms: milliseconds from the request to its first token, preprocessing included.
        tokens_per_second: rate of the tokens after the first; 0.0 if there is only one.
        backend: name of the backend that computed it.
        regions: parts of the picture that the answer names, if the bundle's answers can.
        faults: what names a region wrongly; such a part is in no region.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    finish_reason: Literal["stop", "length"]
    ttft_ms: float
    tokens_per_second: float
    backend: str
    regions: tuple[Region, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def generated_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids)
