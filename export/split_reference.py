"""The PyTorch reference of a model that is rebuilt from transformers' own submodules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from vlmport.export.precision import default_dtype
from vlmport.export.reference import IMAGE_TOKEN, ReferenceAnswer
from vlmport.export.wrappers.vision import feature_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vlmport.contract import PromptFormat, SpecialTokens
    from vlmport.export.tensor_store import TensorStore

__all__ = ["SplitReference", "generated", "load_module", "rendered", "to_numpy"]

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
        second_tower: sees the same pixels; the connector takes both features.
        image_scale: factor of the connector's result; None for none.
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
    second_tower: PreTrainedModel | None = None
    image_scale: float | None = None

    @property
    def causal_model(self) -> Any:
        """See `DecodingReference.causal_model`."""
        return self.language_model

    def move_to(self, device: str) -> None:
        """See `DecodingReference.move_to`."""
        modules: list[nn.Module] = [*self._towers, self.connector, self.language_model]
        for module in modules:
            module.to(device)

    def image_inputs(self, image: Image.Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one RGB picture: pixel_values float32 [1, 3, height, width]."""
        squared = _squared(image, self.pad_colour)
        pixels = self.image_processor([squared], return_tensors="np")["pixel_values"]
        return {"pixel_values": np.asarray(pixels, np.float32)}

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a graph before the decoder computes; see `Reference.run`."""
        if graph == "vision_encoder":
            features = self._vision(_tensor(inputs, "pixel_values"))
            return {feature_name(index): to_numpy(one) for index, one in enumerate(features)}
        if graph == "projector":
            names = [feature_name(index) for index in range(len(self._towers))]
            dtype = self.language_model.dtype
            projected = self._project([_tensor(inputs, name).to(dtype) for name in names])
            return {"image_features": to_numpy(projected)}
        embed = cast("Any", self.language_model.get_input_embeddings())
        return {"inputs_embeds": to_numpy(embed(_tensor(inputs, "input_ids")))}

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        chunks = self._chunks(messages)
        embed = cast("Any", self.language_model.get_input_embeddings())
        device = self.language_model.device
        ids = [*chunks[0]]
        parts = [embed(torch.tensor([chunks[0]], dtype=torch.int64, device=device))]
        # chunk 0, image 0, chunk 1, image 1, ..., last chunk
        for image, chunk in zip(images, chunks[1:], strict=True):
            pixels = _tensor(self.image_inputs(image), "pixel_values").to(device)
            features = self._project(self._vision(pixels))
            ids += [IMAGE_TOKEN] * features.shape[1] + chunk
            parts += [features, embed(torch.tensor([chunk], dtype=torch.int64, device=device))]
        # Where the training code cuts: after merging, prompts with images alone.
        kept = self.prompt.kept_with_images if images else None
        embeds = torch.cat(parts, dim=1)[:, :kept]
        return generated(
            self.language_model,
            self.tokenizer,
            np.array(ids[:kept], np.int64),
            {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2]).long()},
            max_new_tokens,
            self.special_tokens.eos_token_ids,
        )

    @property
    def _towers(self) -> list[PreTrainedModel]:
        return [tower for tower in (self.vision_tower, self.second_tower) if tower is not None]

    def _vision(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for tower in self._towers:
            output = cast("Any", tower)(pixel_values, output_hidden_states=True)
            hidden: torch.Tensor = output.hidden_states[self.feature_layer]
            features.append(hidden[:, 1:] if self.drop_first_token else hidden)
        return features

    def _project(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        projected = cast("torch.Tensor", self.connector(*features))
        return projected if self.image_scale is None else projected * self.image_scale

    def _chunks(self, messages: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Token ids of the text around the placeholders, as Factory's tokenizer_image_token.

        If the first chunk begins with the beginning-of-sequence token, the others lose theirs.
        """
        tokenizer = cast("Any", self.tokenizer)
        text = rendered(tokenizer, messages, self.prompt.chat_template)
        pieces = text.split(self.prompt.image_placeholder)
        chunks = [list(tokenizer(piece).input_ids) for piece in pieces]
        begin = [self.special_tokens.bos_token_id]
        if chunks[0][:1] != begin:
            return chunks
        return [chunks[0], *(c[1:] if c[:1] == begin else c for c in chunks[1:])]


def rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], template: str) -> str:
    """A chat as the text that the model is given, up to where its answer begins."""
    text: str = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return text


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
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
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
    token_ids = to_numpy(output.sequences[0, -steps:]).astype(np.int64)
    text = cast("Any", tokenizer).decode(token_ids, skip_special_tokens=True)
    logits = np.concatenate([to_numpy(step) for step in output.logits]).astype(np.float32)
    # As the runtime hands out the logits of tokens that are never chosen.
    never = cast("Any", model).generation_config.bad_words_ids or []
    logits[:, [token for (token,) in never]] = np.finfo(np.float32).min
    return ReferenceAnswer(prompt_ids, token_ids, logits, text)


def load_module(
    build: Callable[[], ModuleT],
    prefix: str,
    store: TensorStore,
    dtype: torch.dtype,
    stored_name: Callable[[str], str] = str,
) -> ModuleT:
    """Builds a module in a dtype and gives it its weights from a store.

    Args:
        build: makes the module.
        prefix: what the store's names have before the module's own ("vision_tower.").
        store: tensors of the checkpoint; parameters it leaves out keep their initial values.
        dtype: the default one while the module is built.
        stored_name: the module's own name of a parameter -> its name in the store.
    """
    with default_dtype(dtype):
        module = build()
    names = {name: prefix + stored_name(name) for name in module.state_dict()}
    state = {
        name: torch.from_numpy(store.read(stored).astype(np.float32))
        for name, stored in names.items()
        if stored in store.entries
    }
    module.load_state_dict(state, strict=False)
    module.eval()
    return module


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's values; those of any floating-point dtype as float32, which holds them all."""
    plain = tensor.detach().cpu()
    array: NDArray[Any] = (plain.float() if plain.is_floating_point() else plain).numpy()
    return array


def _squared(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """LLaVA's expand2square: the picture centred on a square of one colour."""
    width, height = image.size
    if colour is None or width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _tensor(inputs: Mapping[str, NDArray[Any]], name: str) -> torch.Tensor:
    return torch.from_numpy(inputs[name])
