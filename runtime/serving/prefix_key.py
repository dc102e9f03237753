"""What two prompts have in common, images included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["PrefixKey"]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixKey:
    """Tokens of a sequence by their content.

    Attributes:
        ids: int64 [sequence_length]; the token's id, or -1 - n in a place of the n-th image.
        images: a digest of each image's content.
    """

    ids: NDArray[np.int64]
    images: tuple[bytes, ...]

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)

    @classmethod
    def of_prompt(
        cls,
        input_ids: NDArray[np.int64],
        image_mask: NDArray[np.bool_],
        image_tokens: Sequence[int],
        images: Sequence[bytes],
    ) -> PrefixKey:
        """The key of an encoded prompt.

        Args:
            input_ids: int64 [sequence_length].
            image_mask: bool [sequence_length], True where an image feature takes a place.
            image_tokens: places of each image; the last ones may be cut off.
            images: a digest of each image's content.
        """
        ids = input_ids.copy()
        numbers = np.repeat(np.arange(len(images), dtype=np.int64), np.asarray(image_tokens, int))
        ids[image_mask] = -1 - numbers[: int(image_mask.sum())]
        return cls(ids, tuple(images))

    def extended(self, token_ids: Sequence[int]) -> PrefixKey:
        """The key of this prompt followed by tokens of an answer."""
        return PrefixKey(np.concatenate([self.ids, np.array(token_ids, np.int64)]), self.images)

    def common(self, other: PrefixKey) -> int:
        """How many leading tokens are the same, by content."""
        length = min(len(self), len(other))
        same = self.ids[:length] == other.ids[:length]
        for number, (mine, theirs) in enumerate(zip(self.images, other.images, strict=False)):
            if mine != theirs:
                same &= self.ids[:length] > -1 - number
                break
        return length if same.all() else int(same.argmin())
