"""The PyTorch reference of a model that transformers loads as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmport.export.split_reference import generated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmport.contract import PromptFormat, SpecialTokens
    from vlmport.export.reference import ReferenceAnswer

__all__ = ["WholeModelReference"]


@dataclass(frozen=True, slots=True)
class WholeModelReference:
    """A `...ForConditionalGeneration` with its processor, in float32 on the CPU.

    Attributes:
        model: the transformers model; its classes share no static type with these parts.
        processor: the transformers processor.
        prompt: the prompt form.
        special_tokens: ids with a meaning.
    """

    model: Any
    processor: Any
    prompt: PromptFormat
    special_tokens: SpecialTokens

    def pixel_values(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Preprocesses RGB images with transformers' image processor: [num_images, 3, h, w]."""
        pixels = self.processor.image_processor(list(images), return_tensors="np")["pixel_values"]
        return np.asarray(pixels, np.float32)

    @torch.no_grad()
    def vision_features(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vision encoder: [num_images, num_patches, vision_hidden_size]."""
        config = self.model.config
        output = self.model.model.vision_tower(
            torch.from_numpy(pixel_values), output_hidden_states=True
        )
        hidden = output.hidden_states[config.vision_feature_layer]
        return _numpy(
            hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden
        )

    @torch.no_grad()
    def image_features(self, vision_features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The projector: [num_images, num_image_tokens, hidden_size]."""
        return _numpy(self.model.model.multi_modal_projector(torch.from_numpy(vision_features)))

    @torch.no_grad()
    def inputs_embeds(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The token embedding: [batch, sequence_length, hidden_size]."""
        return _numpy(self.model.get_input_embeddings()(torch.from_numpy(input_ids)))

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        text = self.processor.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.prompt.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = self.processor(
            text=text,
            images=list(images) or None,
            add_special_tokens=self.prompt.add_special_tokens,
            return_tensors="pt",
        )
        # Some tokenizers also return token_type_ids, which these models do not take.
        wanted = {
            name: inputs[name]
            for name in ("input_ids", "attention_mask", "pixel_values")
            if name in inputs
        }
        ids = _numpy(wanted["input_ids"][0])
        return generated(
            self.model,
            self.processor.tokenizer,
            ids[ids != self.special_tokens.image_token_id].astype(np.int64),
            wanted,
            max_new_tokens,
            self.special_tokens.eos_token_ids,
        )


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
