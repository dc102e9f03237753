"""Image features and prompt embeddings that are numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.backends.base import ImageFeatures, PromptEmbeddings

__all__ = ["HostRows", "fuse_image_features", "padded_prompts"]


@dataclass(frozen=True, slots=True, eq=False)
class HostRows:
    """A picture's features, or a prompt's embeddings; see `ImageFeatures`, `PromptEmbeddings`.

    Attributes:
        array: [rows, hidden_size] in the bundle's precision; a row for each token.
    """

    array: NDArray[np.floating[Any]]

    def __len__(self) -> int:
        """Tokens."""
        return len(self.array)

    def numpy(self) -> NDArray[np.floating[Any]]:
        """[rows, hidden_size]; not a copy."""
        return self.array


def fuse_image_features(
    inputs_embeds: NDArray[np.floating[Any]],
    image_mask: NDArray[np.bool_],
    features: Sequence[ImageFeatures],
) -> NDArray[np.floating[Any]]:
    """Replaces the placeholders' embeddings by image features, in reading order.

    Args:
        inputs_embeds: [sequence_length, hidden_size], in the bundle's precision.
        image_mask: bool [sequence_length], True at placeholders; fewer than the features have
            where the prompt was cut.
        features: one for each image of the prompt.

    Returns:
        [sequence_length, hidden_size]; a new array, or the same one if there are no features.

    Source: Liu et al. 2023, "Visual Instruction Tuning", section 4.1.
    """
    if not features:
        return inputs_embeds
    image_features = np.concatenate([image.numpy() for image in features])
    fused = inputs_embeds.copy()
    fused[image_mask] = image_features[: int(image_mask.sum())]
    return fused


def padded_prompts(prompts: Sequence[PromptEmbeddings]) -> NDArray[np.floating[Any]]:
    """Joins prompts of different lengths.

    Args:
        prompts: one or more.

    Returns:
        [batch, sequence_length, hidden_size], padded with zeros on the right; not a copy if there
        is only one.
    """
    rows = [prompt.numpy() for prompt in prompts]
    if len(rows) == 1:
        return rows[0][None]
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest, rows[0].shape[1]), rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
