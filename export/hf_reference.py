"""The PyTorch reference of a model that transformers loads as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmport.export.reference import IMAGE_TOKEN, WholeModel
from vlmport.export.split_reference import generated, rendered, to_numpy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmport.contract import PromptFormat, SpecialTokens
    from vlmport.export.reference import ReferenceAnswer

__all__ = ["WholeModelReference"]


@dataclass(frozen=True, slots=True)
class WholeModelReference(WholeModel):
    """A `...ForConditionalGeneration` with its processor, on the CPU.

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

    def image_inputs(self, image: Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one RGB picture with transformers' image processor."""
        pixels = self.processor.image_processor([image], return_tensors="np")["pixel_values"]
        return {"pixel_values": np.asarray(pixels, np.float32)}

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a graph before the decoder computes; see `Reference.run`."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        if graph == "vision_encoder":
            return {"vision_features": to_numpy(self._vision(tensors["pixel_values"]))}
        if graph == "projector":
            features = tensors["vision_features"].to(self.model.dtype)
            projected = self.model.model.multi_modal_projector(features)
            return {"image_features": to_numpy(projected)}
        embed = self.model.get_input_embeddings()
        return {"inputs_embeds": to_numpy(embed(tensors["input_ids"]))}

    def _vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        output = self.model.model.vision_tower(pixel_values, output_hidden_states=True)
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        hidden = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
        return hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        text = rendered(self.processor.tokenizer, messages, self.prompt.chat_template)
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
        ids = to_numpy(wanted["input_ids"][0]).astype(np.int64)
        return generated(
            self.model,
            self.processor.tokenizer,
            np.where(ids == self.special_tokens.image_token_id, IMAGE_TOKEN, ids),
            wanted,
            max_new_tokens,
            self.special_tokens.eos_token_ids,
        )
