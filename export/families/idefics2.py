"""Idefics2: a NaViT tower for pictures of any size, a perceiver resampler, Mistral.

Graphs: vision_encoder, projector (modality projection and perceiver), embed_tokens, decoder. The
checkpoints of transformers 4 and 5 have the same key names.

Sources: transformers models/idefics2; Laurençon et al. 2024, "What matters when building
vision-language models?"; Dehghani et al. 2023, "Patch n' Pack: NaViT".
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers.models.idefics2 import modeling_idefics2 as modeling

from vlmport.contract import (
    AttentionForm,
    GenerationDefaults,
    ImageTokens,
    ModelDimensions,
    NativeSizeImages,
    PromptFormat,
)
from vlmport.errors import CheckpointError
from vlmport.export.checkpoint import Checkpoint, read_json, weight_files
from vlmport.export.family import ExportPlan, Family
from vlmport.export.parts import causal_language_model, module_store
from vlmport.export.processor_files import (
    chat_template,
    fast_tokenizer,
    load_tokenizer,
    resample_name,
    saved_image_processor,
    special_tokens,
    suppressed_tokens,
)
from vlmport.export.reference import IMAGE_TOKEN, WholeModel
from vlmport.export.split_reference import generated, rendered, to_numpy
from vlmport.export.wrappers.decoder import ATTENTION, decoder_module, kv_layout
from vlmport.export.wrappers.embedding import embedding_module
from vlmport.export.wrappers.native_vision import masked_projector_module, native_tower_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import nn
    from transformers import PreTrainedModel

    from vlmport.contract import SpecialTokens
    from vlmport.export.reference import Reference, ReferenceAnswer
    from vlmport.export.tensor_store import TensorStore, WeightFile
    from vlmport.export.weight_match import PrefixRule

__all__ = ["FAMILY"]

_IMAGE, _AROUND, _END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"
# The base model was trained on text with pictures in it, without roles.
_NO_ROLES = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('this checkpoint has no chat template and takes one message, of the "
    "user') }}{%- endif %}"
    "{%- if messages[0]['content'] is string %}{{ messages[0]['content'] }}"
    "{%- else %}{%- for part in messages[0]['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}"
)
_RULES: tuple[PrefixRule, ...] = (
    ("model.vision_model.", "vision_tower."),
    ("model.connector.", "connector."),
    ("model.text_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    config = _config(checkpoint)
    text, vision = config.text_config, config.vision_config
    latents = int(config.perceiver_config.resampler_n_latents)
    files = weight_files(checkpoint.path)
    processor = _processor(checkpoint, config)
    tokenizer = processor.tokenizer
    template = chat_template(checkpoint.path, tokenizer) or _NO_ROLES
    special = _special_tokens(checkpoint, tokenizer, template, config)

    def reference(dtype: torch.dtype) -> Reference:
        return _Reference(
            transformers.Idefics2ForConditionalGeneration.from_pretrained(
                checkpoint.path, dtype=dtype, local_files_only=True
            ).eval(),
            processor,
            template,
            special,
        )

    def language_model() -> PreTrainedModel:
        return _language_model(config, ATTENTION)

    image = _image_steps(checkpoint, config, processor.image_processor)
    return ExportPlan(
        variant=f"{text.model_type}, {latents} latents, {'split' if image.splits else 'whole'}",
        layout="transformers",
        graphs=(
            native_tower_module(lambda: _tower(config), vision),
            masked_projector_module(
                lambda: _connector(config), vision.hidden_size, latents, text.hidden_size
            ),
            embedding_module(language_model, text.hidden_size),
            decoder_module(language_model, text, text.vocab_size),
        ),
        store=_store(checkpoint, config, files),
        dimensions=ModelDimensions(text.hidden_size, text.vocab_size, text.max_position_embeddings),
        kv_layout=kv_layout(text),
        attention=AttentionForm("causal", first_position=0),
        image=image,
        prompt=PromptFormat(
            chat_template=template,
            image_placeholder=_IMAGE,
            image_tokens=ImageTokens(
                "repeat", _IMAGE, latents, _AROUND, _AROUND, _AROUND, merged_is_spaced=True
            ),
            tokenization="whole",
            add_special_tokens=True,
        ),
        special_tokens=special,
        generation=GenerationDefaults(256, (), suppressed_tokens(checkpoint.path)),
        tokenizer=_embedded_tokens(fast_tokenizer(tokenizer), text.vocab_size),
        source_files=(checkpoint.path / "config.json", *(file.path for file in files)),
        reference=reference,
    )


def _config(checkpoint: Checkpoint) -> Any:  # the parts' configs are declared as dictionaries too
    path = checkpoint.path / "config.json"
    if checkpoint.config.get("use_resampler") is False:
        msg = (
            f"{path}: use_resampler is false; only models with the perceiver resampler can be "
            "exported, as transformers has no others"
        )
        raise CheckpointError(msg)
    try:
        config: Any = transformers.Idefics2Config.from_pretrained(checkpoint.path)
    except Exception as error:  # transformers' validation raises classes of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        msg = f"{path}: transformers refuses it ({' '.join(lines)}); download it again"
        raise CheckpointError(msg) from error
    faults = list(_config_faults(config))
    if faults:
        msg = f"{path}: {'; '.join(faults)}"
        raise CheckpointError(msg)
    return config


def _config_faults(config: Any) -> Iterator[str]:
    text, vision, perceiver = config.text_config, config.vision_config, config.perceiver_config
    if text.model_type != "mistral":
        yield f"language model {text.model_type!r}; expected 'mistral'"
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            yield f"vision_config.{name} {getattr(vision, name)}; expected one number, for a square"
    if perceiver.resampler_n_heads % perceiver.num_key_value_heads:
        yield (
            f"perceiver_config: {perceiver.resampler_n_heads} heads; expected a multiple of "
            f"num_key_value_heads, {perceiver.num_key_value_heads}"
        )


def _processor(checkpoint: Checkpoint, config: Any) -> Any:
    """The checkpoint's Idefics2Processor, which may add tokens that the tokenizer lacks."""
    folder = checkpoint.path
    image_processor = saved_image_processor(folder) or transformers.Idefics2ImageProcessorPil()
    if not isinstance(image_processor, transformers.Idefics2ImageProcessorPil):
        msg = (
            f"{folder}: the image processor is a {type(image_processor).__name__}; expected "
            "Idefics2ImageProcessor; preprocessor_config.json does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    latents = config.perceiver_config.resampler_n_latents
    settings = folder / "processor_config.json"
    found = read_json(settings).get("image_seq_len") if settings.is_file() else None
    if found not in (None, latents):
        msg = (
            f"{settings}: image_seq_len {found}; the resampler makes {latents} tokens of an image "
            "(config.json: perceiver_config.resampler_n_latents); one of the two files does not "
            "belong to this checkpoint"
        )
        raise CheckpointError(msg)
    tokenizer: Any = load_tokenizer(folder)
    highest, rows = max(tokenizer.get_vocab().values()), config.text_config.vocab_size
    processor = transformers.Idefics2Processor(image_processor, tokenizer, image_seq_len=latents)
    token, around = (tokenizer.convert_tokens_to_ids(name) for name in (_IMAGE, _AROUND))
    if token != config.image_token_id or max(highest, token, around) >= rows:
        msg = (
            f"{folder}: the tokenizer has {_IMAGE} as token {token}, {_AROUND} as {around} and ids "
            f"up to {highest}; config.json has image_token_id {config.image_token_id} and "
            f"vocab_size {rows}; the tokenizer does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    return processor


def _embedded_tokens(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer without added tokens that the model has no embedding of.

    The processor adds the token that ends a turn to every tokenizer. The released base model has
    no row for it (vocab_size 32002), so that transformers fails on text with it; here such text
    is read as ordinary characters.
    """
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    return Tokenizer.from_str(json.dumps(content))


def _special_tokens(
    checkpoint: Checkpoint, tokenizer: Any, template: str, config: Any
) -> SpecialTokens:
    """The checkpoint's; where its template ends turns with a token of their own, that ends one."""
    rows = config.text_config.vocab_size
    found = special_tokens(checkpoint.path, tokenizer, config.image_token_id)
    end = tokenizer.convert_tokens_to_ids(_END)
    if _END not in template or end in found.eos_token_ids:
        return found
    if end >= rows:
        msg = (
            f"{checkpoint.path}: the chat template ends turns with {_END}, which is token {end}; "
            f"config.json has vocab_size {rows}; the template does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    return replace(found, eos_token_ids=(*found.eos_token_ids, end))


def _image_steps(checkpoint: Checkpoint, config: Any, processor: Any) -> NativeSizeImages:
    size, patch = processor.size, int(config.vision_config.patch_size)
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    faults = []
    if not shortest or not longest:
        faults.append(f"size {dict(size)}; expected shortest_edge and longest_edge")
    elif shortest < patch:
        faults.append(f"shortest_edge {shortest}; expected a patch of {patch} pixels or more")
    if not (processor.do_resize and processor.do_pad):
        faults.append("do_resize or do_pad is off; expected both, for pictures of any size")
    if faults:
        msg = (
            f"{checkpoint.path}: image processor: {'; '.join(faults)}; preprocessor_config.json "
            "does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    normalizes = processor.do_normalize
    return NativeSizeImages(
        kind="native_size",
        splits=bool(processor.do_image_splitting),
        shortest_edge=int(shortest),
        longest_edge=int(longest),
        patch_size=patch,
        resample=cast("Any", resample_name(processor)),
        rescale_factor=float(processor.rescale_factor) if processor.do_rescale else None,
        mean=cast("Any", tuple(map(float, processor.image_mean))) if normalizes else None,
        std=cast("Any", tuple(map(float, processor.image_std))) if normalizes else None,
    )


def _tower(config: Any) -> nn.Module:
    vision = copy.deepcopy(config.vision_config)
    tower = modeling.Idefics2VisionTransformer._from_config(vision, dtype=torch.get_default_dtype())
    return cast("nn.Module", tower)


def _connector(config: Any) -> nn.Module:
    return modeling.Idefics2Connector(copy.deepcopy(config))


def _language_model(config: Any, attention: str) -> PreTrainedModel:
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings  # of the model with the head
    return causal_language_model(text, attention)


def _store(checkpoint: Checkpoint, config: Any, files: Sequence[WeightFile]) -> TensorStore:
    """The checkpoint's tensors under "vision_tower.", "connector." and "language_model."."""
    modules: dict[str, Callable[[], nn.Module]] = {
        "vision_tower": lambda: _tower(config),
        "connector": lambda: _connector(config),
        "language_model": lambda: _language_model(config, "eager"),
    }
    tied = bool(config.tie_word_embeddings)
    return module_store(checkpoint.path, modules, files, _RULES, has_tied_head=tied)


@dataclass(frozen=True, slots=True)
class _Reference(WholeModel):
    """Idefics2ForConditionalGeneration with Idefics2Processor, on the CPU.

    Attributes:
        model: the transformers model; its classes share no static type with these parts.
        processor: the transformers processor.
        template: renders a chat to the text that the processor is given.
        special_tokens: ids with a meaning.
    """

    model: Any
    processor: Any
    template: str
    special_tokens: SpecialTokens

    def image_inputs(self, image: Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one RGB picture with transformers; counts patches as its model does."""
        inputs = self.processor.image_processor([[image]], return_tensors="np")
        patch = self.model.config.vision_config.patch_size
        pixel_mask = torch.from_numpy(inputs["pixel_attention_mask"][0])
        cells = pixel_mask.unfold(1, patch, patch).unfold(2, patch, patch)
        whole = cells.sum(dim=(-1, -2)) == patch * patch
        counts = torch.stack((whole[:, :, 0].sum(1), whole[:, 0, :].sum(1)), dim=1)
        pixels = np.asarray(inputs["pixel_values"][0], np.float32)
        return {"pixel_values": pixels, "patch_counts": to_numpy(counts)}

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a graph before the decoder computes; see `Reference.run`."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        body = self.model.model
        if graph == "vision_encoder":
            pixels = tensors["pixel_values"].to(self.model.dtype)
            counts = tensors["patch_counts"]
            patch = self.model.config.vision_config.patch_size
            rows, columns = (torch.arange(length // patch) for length in pixels.shape[2:])
            is_row, is_column = rows < counts[:, :1], columns < counts[:, 1:]
            mask = is_row[:, :, None] & is_column[:, None, :]
            hidden = body.vision_model(pixels, patch_attention_mask=mask).last_hidden_state
            return {"vision_features": to_numpy(hidden), "patch_mask": to_numpy(mask.flatten(1))}
        if graph == "projector":
            features = tensors["vision_features"].to(self.model.dtype)
            mask = tensors["patch_mask"]
            return {"image_features": to_numpy(body.connector(features, attention_mask=mask))}
        embed = self.model.get_input_embeddings()
        return {"inputs_embeds": to_numpy(embed(tensors["input_ids"]))}

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        text = rendered(self.processor.tokenizer, messages, self.template)
        pictures = [list(images)] if images else None
        inputs = self.processor(text=[text], images=pictures, return_tensors="pt")
        ids = inputs["input_ids"][0].numpy().astype(np.int64)
        names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
        return generated(
            self.model,
            self.processor.tokenizer,
            np.where(ids == self.special_tokens.image_token_id, IMAGE_TOKEN, ids),
            {name: inputs[name] for name in names if name in inputs},
            max_new_tokens,
            self.special_tokens.eos_token_ids,
        )


FAMILY = Family(name="idefics2", model_types=("idefics2",), plan=_plan)
