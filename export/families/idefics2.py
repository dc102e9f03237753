"""Idefics2: a SigLIP tower for pictures of any size, a perceiver resampler, Mistral.

Graphs: vision_encoder (patches, fractional positions, all layers), projector (modality projection
and perceiver resampler), embed_tokens, decoder. Layout read:
  transformers      Idefics2ForConditionalGeneration, base, instruct and chat: weights below
                    model.vision_model., model.connector., model.text_model. and lm_head.

Sources: transformers models/idefics2; Laurencon et al. 2024, "What matters when building
vision-language models?"; https://huggingface.co/HuggingFaceM4/idefics2-8b.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from transformers.models.idefics2.modeling_idefics2 import (
    Idefics2Connector,
    Idefics2VisionTransformer,
)

from vlmport.contract import (
    AttentionForm,
    GenerationDefaults,
    ImageTokens,
    ModelDimensions,
    NativeSizeImages,
    PromptFormat,
    SpecialTokens,
)
from vlmport.errors import CheckpointError
from vlmport.export.checkpoint import Checkpoint, read_json, weight_files
from vlmport.export.family import ExportPlan, Family
from vlmport.export.processor_files import (
    chat_template,
    fast_tokenizer,
    load_image_processor,
    load_tokenizer,
    special_tokens,
)
from vlmport.export.reference import IMAGE_TOKEN
from vlmport.export.split_reference import generated
from vlmport.export.tracing import build_on_meta
from vlmport.export.weight_match import collect_tensors, match_weights
from vlmport.export.wrappers.decoder import ATTENTION, decoder_module, kv_layout
from vlmport.export.wrappers.embedding import embedding_module
from vlmport.export.wrappers.native_size import native_tower_module, resampler_module

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import nn
    from transformers import PreTrainedModel

    from vlmport.export.reference import Reference, ReferenceAnswer
    from vlmport.export.tensor_store import TensorStore, WeightFile
    from vlmport.export.tracing import TracedModule

__all__ = ["FAMILY"]

_PREFIXES = (
    ("model.vision_model.", "vision_tower."),
    ("model.connector.", "connector."),
    ("model.text_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_END_OF_UTTERANCE = "<end_of_utterance>"
# Base checkpoints have no chat template: text and images follow each other as they are given.
_BASE_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}{%- endfor %}"
)
_RESAMPLE_NAMES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True, slots=True)
class _Parts:
    """The configs of the three parts, as transformers completes them.

    Attributes:
        config: Idefics2Config; its class declares its sections as dictionaries too.
    """

    config: Any

    @property
    def text(self) -> Any:
        """The language model's config; the whole model decides whether its head is tied."""
        text = copy.deepcopy(self.config.text_config)
        text.tie_word_embeddings = bool(self.config.tie_word_embeddings)
        return text

    @property
    def num_latents(self) -> int:
        """Image tokens of one tile."""
        return int(self.config.perceiver_config.resampler_n_latents)

    def build_tower(self) -> nn.Module:
        """The vision tower, on the current default device."""
        config = copy.deepcopy(self.config.vision_config)
        return Idefics2VisionTransformer._from_config(config, attn_implementation="sdpa")

    def build_connector(self) -> nn.Module:
        """Modality projection and resampler, on the current default device."""
        config = copy.deepcopy(self.config)
        config.perceiver_config._attn_implementation = "sdpa"
        return Idefics2Connector(config)

    def build_language_model(self, attention: str = ATTENTION) -> PreTrainedModel:
        """The causal language model, on the current default device."""
        model = transformers.AutoModelForCausalLM.from_config(
            self.text, attn_implementation=attention, dtype=torch.float32
        )
        return cast("PreTrainedModel", model)

    def graphs(self) -> tuple[TracedModule, ...]:
        """What to trace."""
        vision, text = self.config.vision_config, self.text
        return (
            native_tower_module(self.build_tower, vision.patch_size, vision.hidden_size),
            resampler_module(
                self.build_connector, vision.hidden_size, self.num_latents, text.hidden_size
            ),
            embedding_module(self.build_language_model, text.hidden_size),
            decoder_module(self.build_language_model, text, text.vocab_size),
        )

    def store(self, checkpoint: Checkpoint, files: list[WeightFile]) -> TensorStore:
        """The checkpoint's tensors, checked against the modules."""
        modules = {
            "vision_tower": build_on_meta(self.build_tower),
            "connector": build_on_meta(self.build_connector),
            "language_model": build_on_meta(lambda: self.build_language_model("sdpa")),
        }
        expected = {
            f"{prefix}.{name}": tuple(value.shape)
            for prefix, module in modules.items()
            for name, value in module.state_dict().items()
        }
        head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
        tied = {head: embedding} if self.text.tie_word_embeddings else {}
        found = collect_tensors(files, _PREFIXES)
        return match_weights(checkpoint.path, expected, found, lambda _: False, tied)


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    parts = _Parts(_read_config(checkpoint))
    files = weight_files(checkpoint.path)
    store = parts.store(checkpoint, files)
    processor = _processor(checkpoint, parts)
    tokenizer = processor.tokenizer
    image = _image_preprocessing(checkpoint, processor.image_processor, parts)
    template = chat_template(checkpoint.path, tokenizer)
    tokens = _special_tokens(checkpoint, parts, processor, template or "")
    fake = processor.fake_image_token
    image_tokens = ImageTokens(
        "repeat", processor.image_token, parts.num_latents, fake, fake, merged=fake, spaced=fake
    )
    prompt = PromptFormat(
        template or _BASE_TEMPLATE, processor.image_token, image_tokens, "whole", True
    )

    def reference() -> Reference:
        model = transformers.Idefics2ForConditionalGeneration.from_pretrained(
            checkpoint.path, dtype="float32", local_files_only=True
        )
        return _Reference(model.eval(), processor, prompt, tokens)

    text, form = parts.text, "chat template" if template else "base"
    splitting = "split" if image.is_split else "whole"
    return ExportPlan(
        variant=f"{text.model_type} + siglip, {parts.num_latents} latents, {splitting}, {form}",
        layout="transformers",
        graphs=parts.graphs(),
        store=store,
        dimensions=ModelDimensions(text.hidden_size, text.vocab_size, text.max_position_embeddings),
        kv_layout=kv_layout(text),
        attention=AttentionForm("causal", first_position=0),
        image=image,
        prompt=prompt,
        special_tokens=tokens,
        generation=GenerationDefaults(max_new_tokens=256, stop_strings=()),
        tokenizer=fast_tokenizer(tokenizer),
        source_files=(checkpoint.path / "config.json", *(file.path for file in files)),
        reference=reference,
    )


def _read_config(checkpoint: Checkpoint) -> Any:
    """The config that transformers would build, with its defaults for keys that are absent."""
    values = {k: v for k, v in copy.deepcopy(checkpoint.config).items() if k != "model_type"}
    where = checkpoint.path / "config.json"
    if values.get("use_resampler") is False:
        msg = (
            f"{where}: use_resampler is false; only models with the perceiver resampler can be "
            "exported, since transformers builds no other"
        )
        raise CheckpointError(msg)
    try:
        config = transformers.Idefics2Config(**values)
    except Exception as error:  # huggingface_hub's strict dataclasses raise errors of their own
        msg = f"{where}: transformers refuses it ({' '.join(str(error).split())}); correct it"
        raise CheckpointError(msg) from error
    text, vision = cast("Any", config.text_config), cast("Any", config.vision_config)
    if text.model_type != "mistral":
        msg = f"{where}: text_config.model_type {text.model_type!r} is not supported; known: mistral"
        raise CheckpointError(msg)
    sizes = (vision.image_size, vision.patch_size)
    if not all(isinstance(size, int) for size in sizes) or vision.num_channels != 3:
        msg = (
            f"{where}: vision_config has image_size {sizes[0]}, patch_size {sizes[1]} and "
            f"{vision.num_channels} channels; expected one number each and 3 channels"
        )
        raise CheckpointError(msg)
    return config


def _processor(checkpoint: Checkpoint, parts: _Parts) -> Any:
    """transformers' own processor; it adds its tokens to a tokenizer that lacks them."""
    images = load_image_processor(checkpoint.path, "", parts.config.vision_config.image_size)
    if not isinstance(images, transformers.Idefics2ImageProcessorPil):
        msg = (
            f"{checkpoint.path}: found the settings of {type(images).__name__}, or none; expected "
            "preprocessor_config.json of an Idefics2ImageProcessor; download it"
        )
        raise CheckpointError(msg)
    settings = checkpoint.path / "processor_config.json"
    values = read_json(settings) if settings.is_file() else {}
    length = values.get("image_seq_len", parts.num_latents)
    if length != parts.num_latents:
        msg = (
            f"{settings}: image_seq_len is {length}; config.json's "
            f"perceiver_config.resampler_n_latents is {parts.num_latents}; expected the same "
            "number; the files belong to different models"
        )
        raise CheckpointError(msg)
    return transformers.Idefics2Processor(
        images, load_tokenizer(checkpoint.path), image_seq_len=parts.num_latents
    )


def _special_tokens(
    checkpoint: Checkpoint, parts: _Parts, processor: Any, template: str
) -> SpecialTokens:
    """Checks the image tokens; where the template closes turns, the closing token ends an answer."""
    tokenizer, vocab_size = processor.tokenizer, parts.text.vocab_size
    wanted = int(parts.config.image_token_id)
    if processor.image_token_id != wanted:
        msg = (
            f"{checkpoint.path}: the tokenizer has {processor.image_token!r} at "
            f"{processor.image_token_id}, config.json has image_token_id {wanted}; the tokenizer "
            "does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    tokens = special_tokens(checkpoint.path, tokenizer, wanted)
    ends = tokens.eos_token_ids
    needed = {processor.image_token: wanted}
    needed[processor.fake_image_token] = tokenizer.convert_tokens_to_ids(processor.fake_image_token)
    if _END_OF_UTTERANCE in template:
        needed[_END_OF_UTTERANCE] = tokenizer.convert_tokens_to_ids(_END_OF_UTTERANCE)
        ends = tuple(dict.fromkeys((*ends, needed[_END_OF_UTTERANCE])))
    outside = [f"{token} ({index})" for token, index in needed.items() if index >= vocab_size]
    if outside:
        msg = (
            f"{checkpoint.path}: the tokenizer has {', '.join(outside)} beyond the model's "
            f"vocabulary of {vocab_size}; the tokenizer does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    return SpecialTokens(tokens.bos_token_id, ends, wanted, tokens.bos_token, tokens.eos_token)


def _image_preprocessing(checkpoint: Checkpoint, processor: Any, parts: _Parts) -> NativeSizeImages:
    where = f"{checkpoint.path}: image processor"
    size = processor.size
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if not (processor.do_resize and processor.do_pad and shortest and longest):
        msg = (
            f"{where}: do_resize {processor.do_resize}, do_pad {processor.do_pad}, size "
            f"{dict(size)}; expected resizing by shortest_edge and longest_edge, and padding"
        )
        raise CheckpointError(msg)
    patch: int = parts.config.vision_config.patch_size
    if not patch <= shortest <= longest:
        msg = (
            f"{where}: shortest_edge {shortest} and longest_edge {longest}; expected a patch of "
            f"the vision tower, {patch} pixels, or more, and the longest to be no shorter; "
            "preprocessor_config.json does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    mean = tuple(float(item) for item in processor.image_mean)
    std = tuple(float(item) for item in processor.image_std)
    return NativeSizeImages(
        kind="native_size",
        is_split=bool(processor.do_image_splitting),
        shortest_edge=int(shortest),
        longest_edge=int(longest),
        resample=cast("Any", _RESAMPLE_NAMES[int(processor.resample)]),
        patch_size=patch,
        rescale_factor=float(processor.rescale_factor) if processor.do_rescale else None,
        mean=cast("tuple[float, float, float]", mean) if processor.do_normalize else None,
        std=cast("tuple[float, float, float]", std) if processor.do_normalize else None,
    )


@dataclass(frozen=True, slots=True)
class _Reference:
    """`Idefics2ForConditionalGeneration` with its processor, in float32 on the CPU.

    Attributes:
        model: the transformers model.
        processor: the transformers processor.
        prompt: the prompt form.
        special_tokens: ids with a meaning.
    """

    model: Any
    processor: Any
    prompt: PromptFormat
    special_tokens: SpecialTokens

    def image_inputs(self, image: Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one RGB picture; see `Reference.image_inputs`."""
        inputs = self.processor.image_processor([image], return_tensors="np")
        mask = torch.from_numpy(inputs["pixel_attention_mask"][0])
        size = self.model.config.vision_config.patch_size
        # A patch counts if all of its pixels do (Idefics2Model.get_image_features).
        whole = mask.unfold(1, size, size).unfold(2, size, size).sum((-1, -2)) == size * size
        grid = torch.stack((whole[:, :, 0].sum(1), whole[:, 0].sum(1)), dim=1)
        pixels = np.asarray(inputs["pixel_values"][0], np.float32)
        return {"pixel_values": pixels, "patch_grid": grid.numpy()}

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a graph before the decoder computes; see `Reference.run`."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        if graph == "vision_encoder":
            return self._vision(tensors["pixel_values"], tensors["patch_grid"])
        if graph == "projector":
            mask = tensors["patch_attention_mask"]
            features = self.model.model.connector(tensors["vision_features"], attention_mask=mask)
            return {"image_features": features.numpy()}
        embed = self.model.get_input_embeddings()
        return {"inputs_embeds": embed(tensors["input_ids"]).numpy()}

    def _vision(self, pixels: torch.Tensor, grid: torch.Tensor) -> dict[str, NDArray[Any]]:
        size = self.model.config.vision_config.patch_size
        rows, columns = (torch.arange(side // size) for side in pixels.shape[2:])
        mask = (rows < grid[:, :1])[:, :, None] & (columns < grid[:, 1:])[:, None, :]
        output = self.model.model.vision_model(pixels, patch_attention_mask=mask)
        features = output.last_hidden_state.numpy()
        return {"vision_features": features, "patch_attention_mask": mask.flatten(1).numpy()}

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.prompt.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = self.processor(text=text, images=list(images) or None, return_tensors="pt")
        names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
        wanted = {name: inputs[name] for name in names if name in inputs}
        ids = wanted["input_ids"][0].numpy().astype(np.int64)
        prompt_ids = np.where(ids == self.special_tokens.image_token_id, IMAGE_TOKEN, ids)
        ends = self.special_tokens.eos_token_ids
        return generated(self.model, tokenizer, prompt_ids, wanted, max_new_tokens, ends)


FAMILY = Family(name="idefics2", model_types=("idefics2",), plan=_plan)
