"""What the training loop needs to know of a model family and of its lessons, and nothing more."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image
from torch import Tensor, nn

from tiny.questions import Pictured, Question, Sample

__all__ = ["Curriculum", "Pixels", "TinyFamily", "Turn"]

# The images of one example, in order: each uint8 [3, height, width], in the size the model sees.
Pixels = tuple[Tensor, ...]
P = TypeVar("P", bound=Pictured)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer, as token ids.

    Attributes:
        ids: the question's ids, then the answer's ids and the end-of-sequence id.
        answer_start: index into ids of the answer's first id.
    """

    ids: list[int]
    answer_start: int


class Curriculum(Protocol[P]):
    """What a family is taught: drawings, questions about them, and what their features tell."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of questions."""
        ...

    @property
    def label_sizes(self) -> tuple[int, ...]:
        """Returns, for each label that a feature has to tell, how many values it has."""
        ...

    def examples(self, seed: int) -> Iterator[P]:
        """Yields an endless, reproducible stream of training drawings."""
        ...

    def heldout(self, count: int, seed: int) -> list[Sample[P]]:
        """Makes a held-out set: as many questions of each kind; no drawing is for training."""
        ...

    def labels(self, example: P) -> Tensor:
        """Returns int64 [num_features, len(label_sizes)]: what each feature has to tell."""
        ...

    def ask(self, example: P, rng: random.Random) -> list[Question]:
        """Lists questions about an example; those that training needs most come first."""
        ...


class TinyFamily(Protocol):
    """A tiny model of one family: its modules, its prompt and its checkpoint.

    Attributes:
        module: every weight of the checkpoint.
        feature_size: width of the features that the first phase teaches.
        image_token_id: stands in a sequence where an image token's embedding goes.
        eos_token_id: the id that ends an answer.
        first_position: position of a sequence's first token.
        sees_whole_prompt: whether image and question see each other in both directions.
        talks_in_turns: whether some training sequences are conversations of several turns.
    """

    module: nn.Module
    feature_size: int
    image_token_id: int
    eos_token_id: int
    first_position: int
    sees_whole_prompt: bool
    talks_in_turns: bool

    @property
    def tower(self) -> nn.Module:
        """Returns the part of `module` that the first phase teaches and the second one freezes.

        Read-only here, so that a family may declare its own, narrower class.
        """
        ...

    def resize(self, image: Image.Image) -> Tensor:
        """Returns uint8 [3, height, width]: the image as its processor resizes it."""
        ...

    def features(self, batch: Sequence[Pixels]) -> Tensor:
        """Returns float32 [num_features, feature_size], of all examples one behind the other."""
        ...

    def image_tokens(self, batch: Sequence[Pixels]) -> list[Tensor]:
        """Returns float32 [num_image_tokens, hidden_size] for each example."""
        ...

    def prefix(self, pixels: Pixels) -> list[int]:
        """Returns the ids in front of every question, with image_token_id for each image token."""
        ...

    def turn(self, question: str, answer: str, *, is_first: bool) -> Turn:
        """Returns the ids behind the prefix for a first turn, or those of a later turn."""
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

    def decode_text(self, token_ids: list[int]) -> str:
        """Turns an answer's ids into text."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the checkpoint."""
        ...
