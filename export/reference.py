"""What a bundle is compared with: the PyTorch model of the same checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["Reference", "ReferenceAnswer"]


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceAnswer:
    """A greedy answer of the PyTorch model.

    Attributes:
        prompt_ids: int64 [prompt_length], the text tokens of the prompt in order, without images.
        token_ids: int64 [generated_tokens], the end-of-sequence token included if it came.
        logits: float32 [generated_tokens, vocab_size], from which each token was chosen.
        text: the decoded answer without special tokens.
    """

    prompt_ids: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    text: str


class Reference(Protocol):
    """A PyTorch model with its transformers processors, in float32 on the CPU."""

    def pixel_values(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Preprocesses RGB images with transformers' image processor: [num_images, 3, h, w]."""
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
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`.

        Args:
            messages: chat in transformers' form (role, content parts of type text or image).
            images: RGB, in the order of the image parts.
            max_new_tokens: most tokens to generate.
        """
        ...
