"""The PyTorch reference of a model that is rebuilt from transformers' own submodules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from vlmport.export.reference import ReferenceAnswer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vlmport.contract import PromptFormat, SpecialTokens
    from vlmport.export.tensor_store import TensorStore

__all__ = ["SplitReference", "generated", "load_module"]

ModuleT = TypeVar("ModuleT", bound="nn.Module")


@dataclass(frozen=True, slots=True)
class SplitReference:
    """Tower, connector and language model of a checkpoint, run by transformers.

    Attributes:
        image_processor: a transformers image processor.
        pad_colour: makes pictures square before the processor; None leaves them.
        vision_tower: the whole tower, with the layers that the export leaves out.
        feature_layer: index into its hidden states.
        drop_first_token: whether token 0 is left out.
        connector: vision features -> image features.
        language_model: a causal language model.
        tokenizer: the checkpoint's.
        prompt: the prompt form, rendered by transformers' own chat templates.
        special_tokens: ids with a meaning.
    """

    image_processor: Any  # transformers' image processors share no useful static type
    pad_colour: tuple[int, int, int] | None
    vision_tower: PreTrainedModel
    feature_layer: int
    drop_first_token: bool
    connector: nn.Module
    language_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptFormat
    special_tokens: SpecialTokens

    def pixel_values(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Preprocesses RGB images with transformers' image processor: [num_images, 3, h, w]."""
        squared = [_squared(image, self.pad_colour) for image in images]
        pixels = self.image_processor(squared, return_tensors="np")["pixel_values"]
        return np.asarray(pixels, np.float32)

    @torch.no_grad()
    def vision_features(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vision encoder: [num_images, num_patches, vision_hidden_size]."""
        output = cast("Any", self.vision_tower)(
            torch.from_numpy(pixel_values), output_hidden_states=True
        )
        hidden: torch.Tensor = output.hidden_states[self.feature_layer]
        return _numpy(hidden[:, 1:] if self.drop_first_token else hidden)

    @torch.no_grad()
    def image_features(self, vision_features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The projector: [num_images, num_image_tokens, hidden_size]."""
        return _numpy(self.connector(torch.from_numpy(vision_features)))

    @torch.no_grad()
    def inputs_embeds(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The token embedding: [batch, sequence_length, hidden_size]."""
        embed = cast("Any", self.language_model.get_input_embeddings())
        return _numpy(embed(torch.from_numpy(input_ids)))

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        chunks = self._chunks(messages)
        parts = [self.inputs_embeds(np.array([chunk], np.int64)) for chunk in chunks]
        if images:
            features = self.image_features(self.vision_features(self.pixel_values(images)))
            # chunk 0, image 0, chunk 1, image 1, ..., last chunk
            interleaved = [parts[0]]
            for feature, part in zip(features, parts[1:], strict=True):
                interleaved += [feature[None], part]
            parts = interleaved
        embeds = torch.from_numpy(np.concatenate(parts, axis=1))
        ids = np.array([token for chunk in chunks for token in chunk], np.int64)
        return generated(
            self.language_model,
            self.tokenizer,
            ids,
            {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2]).long()},
            max_new_tokens,
            self.special_tokens.eos_token_ids,
        )

    def _chunks(self, messages: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Token ids of the text around the placeholders, as Factory's tokenizer_image_token.

        If the first chunk begins with the beginning-of-sequence token, the others lose theirs.
        """
        tokenizer = cast("Any", self.tokenizer)
        text: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.prompt.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        pieces = text.split(self.prompt.image_placeholder)
        chunks = [list(tokenizer(piece).input_ids) for piece in pieces]
        begin = [self.special_tokens.bos_token_id]
        if chunks[0][:1] != begin:
            return chunks
        return [chunks[0], *(c[1:] if c[:1] == begin else c for c in chunks[1:])]


def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: NDArray[np.int64],
    inputs: dict[str, torch.Tensor],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> ReferenceAnswer:
    """Runs transformers' greedy `generate` and keeps the logits of every step.

    Args:
        model: a model with a generation loop.
        tokenizer: decodes the answer.
        prompt_ids: int64 [prompt_length], handed through to the answer.
        inputs: the model's tensors, batch of one.
        max_new_tokens: most tokens to generate.
        eos_token_ids: any of them ends the answer.
    """
    output = cast("Any", model).generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = len(output.logits)
    token_ids = _numpy(output.sequences[0, -steps:]).astype(np.int64)
    text = cast("Any", tokenizer).decode(token_ids, skip_special_tokens=True)
    logits = np.concatenate([_numpy(step) for step in output.logits])
    return ReferenceAnswer(prompt_ids, token_ids, logits.astype(np.float32), text)


def load_module(module: ModuleT, prefix: str, store: TensorStore) -> ModuleT:
    """Gives a module its weights from a store, in float32.

    Args:
        module: built on the CPU.
        prefix: what the store's names have before the module's own ("vision_tower.").
        store: tensors of the checkpoint; parameters it leaves out keep their initial values.
    """
    names = [name for name in module.state_dict() if prefix + name in store.entries]
    state = {name: torch.from_numpy(store.read(prefix + name).astype(np.float32)) for name in names}
    module.load_state_dict(state, strict=False)
    module.eval()
    return module


def _squared(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """LLaVA's expand2square: the picture centred on a square of one colour."""
    width, height = image.size
    if colour is None or width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
