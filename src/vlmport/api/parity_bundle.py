"""An opened bundle in the form that `vlmport.api.parity_model` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.api.parity_model import PromptTokens, TokensAndText
from vlmport.runtime import Request, VisionLanguageModel
from vlmport.runtime.prompt import parse_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmport.api.builtin_cases import Case

__all__ = ["OpenedBundle", "open_bundle"]


def open_bundle(bundle: Path) -> OpenedBundle:
    """Opens a bundle and checks all of its files.

    Raises:
        BundleError: if the bundle is missing, damaged, unsafe or newer than this vlmport.
    """
    return OpenedBundle(VisionLanguageModel.load(bundle))


class OpenedBundle:
    """A `ComparedModel` that runs a bundle through its public API, as a user's program would."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model

    @property
    def backend(self) -> str:
        """Name of what computes the graphs."""
        return self._model.backend

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and answer, of one sequence."""
        return self._model.manifest.dimensions.max_length

    def preprocess(self, images: Sequence[Path | Image]) -> NDArray[np.float32]:
        """Pictures of any mode -> [num_images, 3, height, width]."""
        return self._model.preprocess(images)

    def encode(self, messages: Sequence[dict[str, Any]]) -> PromptTokens:
        """Renders and tokenizes a chat in transformers' form."""
        prompt = self._model.encode(parse_messages(list(messages)))
        return PromptTokens(np.asarray(prompt.text_ids, np.int64), len(prompt.input_ids))

    def vision_features(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vision encoder: [num_images, num_patches, vision_hidden_size]."""
        return self._model.vision_features(pixel_values)

    def image_features(self, vision_features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The projector: [num_images, num_image_tokens, hidden_size]."""
        return self._model.image_features(vision_features)

    def inputs_embeds(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The token embedding: [batch, sequence_length, hidden_size]."""
        return self._model.inputs_embeds(input_ids)

    def greedy(
        self,
        cases: Sequence[Case],
        max_new_tokens: int,
        on_logits: Callable[[NDArray[np.float32]], None],
    ) -> list[TokensAndText]:
        """Answers cases in one batch; `on_logits` gets float32 [batch, vocab_size] of each step."""
        requests = [
            Request(
                messages=parse_messages(case.messages),
                images=case.images,
                max_new_tokens=max_new_tokens,
            )
            for case in cases
        ]
        results = self._model.generate_batch(requests, on_logits=on_logits)
        return [TokensAndText(result.token_ids, result.text) for result in results]
