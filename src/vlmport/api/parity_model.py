"""What a parity run needs of an opened bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmport.api.builtin_cases import Case

__all__ = ["ComparedModel", "PromptTokens", "TokensAndText"]


@dataclass(frozen=True, slots=True, eq=False)
class PromptTokens:
    """An encoded chat.

    Attributes:
        text_ids: int64 [num_text_tokens], without images.
        length: text and image tokens.
    """

    text_ids: NDArray[np.int64]
    length: int


@dataclass(frozen=True, slots=True)
class TokensAndText:
    """An answer of the bundle; its logits were handed out step by step."""

    token_ids: tuple[int, ...]
    text: str


class ComparedModel(Protocol):
    """What is needed of an opened bundle; numpy in, numpy out."""

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and answer, of one sequence."""
        ...

    def preprocess(self, images: Sequence[Path | Image]) -> NDArray[np.float32]:
        """Pictures of any mode -> [num_images, 3, height, width]."""
        ...

    def encode(self, messages: Sequence[dict[str, Any]]) -> PromptTokens:
        """Renders and tokenizes a chat in transformers' form."""
        ...

    def vision_features(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vision encoder: [num_images, num_patches, vision_hidden_size]."""
        ...

    def image_features(self, vision_features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The projector: [num_images, num_image_tokens, hidden_size]."""
        ...

    def inputs_embeds(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The token embedding: [batch, sequence_length, hidden_size]."""
        ...

    def greedy(
        self,
        cases: Sequence[Case],
        max_new_tokens: int,
        on_logits: Callable[[NDArray[np.float32]], None],
    ) -> list[TokensAndText]:
        """Answers cases in one batch; `on_logits` gets float32 [batch, vocab_size] of each step."""
        ...
