"""What the training loop needs to know of a model family, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor, nn

__all__ = ["Prompt", "TinyFamily", "Turn"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids around the image.

    Attributes:
        before: ids in front of the image tokens, the same for every question; may be empty.
        after: ids behind the image tokens, up to where the answer begins.
    """

    before: list[int]
    after: list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer, as token ids.

    Attributes:
        ids: the question's ids, then the answer's ids and the end-of-sequence id.
        answer_start: index into ids of the answer's first id.
    """

    ids: list[int]
    answer_start: int


class TinyFamily(Protocol):
    """A tiny model of one family: its modules, its prompt and its checkpoint.

    Attributes:
        module: every weight of the checkpoint.
        image_size: side of the square image the tower takes, pixels.
        patch_cells: for every patch feature, the drawing's cell it lies in (index into PLACES).
        feature_size: width of a patch feature.
        num_image_tokens: image tokens in the decoder's sequence.
        eos_token_id: the id that ends an answer.
    """

    module: nn.Module
    image_size: int
    patch_cells: list[int]
    feature_size: int
    num_image_tokens: int
    eos_token_id: int

    @property
    def tower(self) -> nn.Module:
        """Returns the part of `module` that the first phase teaches and the second one freezes.

        Read-only here, so that a family may declare its own, narrower class.
        """
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """Returns float32 [3, image_size, image_size], as the family's processor gives it."""
        ...

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turns resized uint8 [batch, 3, height, width] into float32 pixel_values."""
        ...

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """Returns float32 [batch, num_patches, feature_size], the tower's output."""
        ...

    def image_tokens(self, patch_features: Tensor) -> Tensor:
        """Returns float32 [batch, num_image_tokens, hidden_size], the connector's output."""
        ...

    def embed(self, input_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size] for int64 ids."""
        ...

    def decode(self, inputs_embeds: Tensor, allowed: Tensor, position_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size], the decoder's last hidden states.

        Args:
            inputs_embeds: float32 [batch, sequence_length, hidden_size].
            allowed: bool [batch, 1, sequence_length, sequence_length], True where a query (third
                axis) may see a key (fourth axis).
            position_ids: int64 [batch, sequence_length].
        """
        ...

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Returns float32 [..., vocab_size]."""
        ...

    def prompt(self, question: str) -> Prompt:
        """Returns the ids of a single-question prompt."""
        ...

    def turn(self, question: str, answer: str, *, is_first: bool) -> Turn:
        """Returns the ids behind the image for a first turn, or those of a later turn."""
        ...

    def decode_text(self, token_ids: list[int]) -> str:
        """Turns an answer's ids into text."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the checkpoint."""
        ...
