"""Fuyu: patches of a picture go through one linear layer into a Persimmon language model.

Graphs: projector, embed_tokens, decoder; there is no vision encoder. Layouts read:
  transformers-4    keys of the released checkpoint (language_model.model.*, vision_embed_tokens.*)
  transformers-5    keys that transformers 5 writes (model.language_model.*, lm_head.*)

Sources: transformers models/fuyu and models/persimmon; https://www.adept.ai/blog/fuyu-8b.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.fuyu import processing_fuyu
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from vlmport.contract import (
    AttentionForm,
    CoordinateAnswers,
    CoordinateTokens,
    GenerationDefaults,
    ImageTokens,
    ModelDimensions,
    PatchImages,
    PromptFormat,
)
from vlmport.errors import CheckpointError
from vlmport.export.checkpoint import Checkpoint, weight_files
from vlmport.export.family import ExportPlan, Family
from vlmport.export.parts import causal_language_model, module_store
from vlmport.export.processor_files import (
    fast_tokenizer,
    load_tokenizer,
    resample_name,
    saved_image_processor,
    special_tokens,
    suppressed_tokens,
)
from vlmport.export.reference import IMAGE_TOKEN, WholeModel
from vlmport.export.split_reference import generated, to_numpy
from vlmport.export.wrappers.connectors import patch_projector_module
from vlmport.export.wrappers.decoder import ATTENTION, decoder_module, kv_layout
from vlmport.export.wrappers.embedding import embedding_module

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image
    from transformers import FuyuConfig, PretrainedConfig, PreTrainedModel

    from vlmport.contract import SpecialTokens
    from vlmport.export.reference import Reference, ReferenceAnswer
    from vlmport.export.tensor_store import TensorStore, WeightFile
    from vlmport.export.weight_match import PrefixRule

__all__ = ["FAMILY"]

_IMAGE, _ROW_END, _ANSWER = "|SPEAKER|", "|NEWLINE|", "<0x04>"
_COORDINATES = CoordinateTokens("<0x00>", "<0x01>", "<0x02>", "<0x03>", prompt_end=_ANSWER)
_LOCATION = re.compile("</?(box|point)>|<0x0[0-3]>")
# FuyuProcessor: the first image comes first, the others where the text names them; each is followed
# by the beginning-of-sequence token; the answer's marker ends a prompt with images, and no other.
_TEMPLATE = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('this prompt form takes one message, of role user') }}{%- endif %}"
    "{%- set content = messages[0]['content'] %}"
    "{%- if content is string %}{{ content }}"
    "{%- else %}"
    "{%- set image = '" + _IMAGE + "' + bos_token %}"
    "{%- set turn = namespace(images=0, text='') %}"
    "{%- for part in content %}"
    "{%- if part['type'] == 'image' %}"
    "{%- set turn.text = turn.text + (image if turn.images else '') %}"
    "{%- set turn.images = turn.images + 1 %}"
    "{%- else %}{% set turn.text = turn.text + part['text'] %}{%- endif %}"
    "{%- endfor %}"
    "{{ image + turn.text + '" + _ANSWER + "' if turn.images else turn.text }}"
    "{%- endif %}"
)
_RULES: tuple[PrefixRule, ...] = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_embed_tokens.", "connector."),
    ("lm_head.", "language_model.lm_head."),
    ("vision_embed_tokens.", "connector."),
)
# Others compute the rotation's frequencies from the length of the sequence, which a graph with
# fixed tables cannot do.
_ROPE_TYPES = ("default", "linear")


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    config, text = _configs(checkpoint)
    files = weight_files(checkpoint.path)
    tokenizer = load_tokenizer(checkpoint.path)
    _check_vocabulary(checkpoint, config, text, tokenizer.get_vocab())
    processor = _image_processor(checkpoint, config)
    special = special_tokens(checkpoint.path, tokenizer, config.image_token_id)
    image_tokens = ImageTokens("rows", _IMAGE, 1, "", _ROW_END, "")
    prompt = PromptFormat(_TEMPLATE, _IMAGE, image_tokens, "image_first", True, _COORDINATES)

    def reference(dtype: torch.dtype) -> Reference:
        model: Any = transformers.FuyuForCausalLM.from_pretrained(
            checkpoint.path, dtype=dtype, local_files_only=True
        )
        own = transformers.FuyuProcessor(processor, load_tokenizer(checkpoint.path))
        return _FuyuReference(model.eval(), own, special)

    def language_model() -> PreTrainedModel:
        return causal_language_model(text, ATTENTION)

    is_old = any(key.startswith("language_model.") for file in files for key in file.tensors)
    return ExportPlan(
        variant=f"{text.model_type}, patches of {config.patch_size}",
        layout="transformers-4" if is_old else "transformers-5",
        graphs=(
            patch_projector_module(
                lambda: _patch_projector(config), _patch_length(config), text.hidden_size
            ),
            embedding_module(language_model, text.hidden_size),
            decoder_module(language_model, text, text.vocab_size),
        ),
        store=_store(checkpoint, config, files),
        dimensions=ModelDimensions(text.hidden_size, text.vocab_size, text.max_position_embeddings),
        kv_layout=kv_layout(text),
        attention=AttentionForm("causal", first_position=0),
        image=_image_steps(checkpoint, config, processor),
        prompt=prompt,
        special_tokens=special,
        generation=GenerationDefaults(256, (), suppressed_tokens(checkpoint.path)),
        tokenizer=fast_tokenizer(tokenizer),
        source_files=(checkpoint.path / "config.json", *(file.path for file in files)),
        reference=reference,
        answers=CoordinateAnswers("coordinate_tokens"),
    )


def _configs(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """(FuyuConfig, config of its language model); the classes declare unions for their fields."""
    path = checkpoint.path / "config.json"
    try:
        config: Any = transformers.FuyuConfig.from_pretrained(checkpoint.path)
        text = config.text_config
        faults = list(_config_faults(config, text))
    except Exception as error:  # transformers' validation raises classes of its own
        msg = (
            f"{path}: transformers cannot read it ({str(error).splitlines()[0]}); download it again"
        )
        raise CheckpointError(msg) from error
    if faults:
        msg = f"{path}: {'; '.join(faults)}"
        raise CheckpointError(msg)
    return config, text


def _config_faults(config: Any, text: Any) -> Sequence[str]:
    if text.model_type != "persimmon":
        return [f"language model {text.model_type!r}; expected 'persimmon'"]
    faults = []
    if text.hidden_size % text.num_attention_heads:
        faults.append(
            f"hidden_size {text.hidden_size} is no multiple of num_attention_heads "
            f"{text.num_attention_heads}; expected heads of a whole length"
        )
    if (kind := text.rope_parameters["rope_type"]) not in _ROPE_TYPES:
        faults.append(f"rope type {kind!r} is not supported; available: {', '.join(_ROPE_TYPES)}")
    if config.num_channels != 3:
        faults.append(f"num_channels {config.num_channels}; expected 3, pictures are RGB")
    return faults


def _check_vocabulary(
    checkpoint: Checkpoint, config: Any, text: Any, vocabulary: Mapping[str, int]
) -> None:
    missing = [name for name in (_IMAGE, _ROW_END, _ANSWER) if name not in vocabulary]
    if missing:
        msg = (
            f"{checkpoint.path}: the tokenizer has no token {', '.join(missing)}; expected the "
            "tokenizer that was saved with the model"
        )
        raise CheckpointError(msg)
    found, last = vocabulary[_IMAGE], max(vocabulary.values())
    if found != config.image_token_id or last >= text.vocab_size:
        msg = (
            f"{checkpoint.path}: the tokenizer has {_IMAGE} as token {found} and ids up to "
            f"{last}; config.json has image_token_id {config.image_token_id} "
            f"and vocab_size {text.vocab_size}; the tokenizer does not belong to this checkpoint"
        )
        raise CheckpointError(msg)


def _image_processor(checkpoint: Checkpoint, config: Any) -> Any:
    """The checkpoint's image processor; without a file the one that the model was released with."""
    processor = saved_image_processor(checkpoint.path)
    if processor is None:
        patch: Any = {"height": config.patch_size, "width": config.patch_size}
        processor = FuyuImageProcessorPil(patch_size=patch)
    if not isinstance(processor, FuyuImageProcessorPil):
        msg = (
            f"{checkpoint.path}: the image processor is a {type(processor).__name__}; expected "
            "FuyuImageProcessor; preprocessor_config.json does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    processor.patchify_image = _patchify  # type: ignore[method-assign]
    return processor


def _patchify(image: Any, patch_size: Any = None) -> Any:
    """Stands for FuyuImageProcessorPil.patchify_image, which fails in transformers 5.23.

    It calls numpy's transpose on the tensor that FuyuProcessor hands it (TypeError); this does what
    it means, and what the class for torchvision does: values of a patch in the order row, column,
    channel.
    """
    height, width = patch_size.height, patch_size.width
    batch, channels = image.shape[:2]
    grid = image.unflatten(3, (-1, width)).unflatten(2, (-1, height))
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, height * width * channels)


def _image_steps(checkpoint: Checkpoint, config: Any, processor: Any) -> PatchImages:
    size, patch = processor.size, processor.patch_size
    found = (patch["height"], patch["width"])
    faults = []
    if found != (config.patch_size, config.patch_size):
        faults.append(f"patches of {found}; the model takes {config.patch_size} a side")
    if size["height"] % found[0] or size["width"] % found[1]:
        faults.append(
            f"a largest size of {size['height']}x{size['width']}; expected whole patches of {found}"
        )
    if not (processor.do_resize and processor.do_pad):
        faults.append("do_resize or do_pad is off; then most pictures are not whole patches")
    value = processor.padding_value
    if processor.padding_mode != "constant" or not 0 <= value <= 255 or value != int(value):
        faults.append(
            f"padding {processor.padding_mode!r} with {value}; expected 'constant' with a whole "
            "number from 0 to 255"
        )
    if faults:
        msg = (
            f"{checkpoint.path}: image processor: {'; '.join(faults)}; preprocessor_config.json "
            "does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    return PatchImages(
        kind="patches",
        patch_height=int(found[0]),
        patch_width=int(found[1]),
        patch_axes="height_width_channels",
        max_height=int(size["height"]),
        max_width=int(size["width"]),
        resample=cast("Any", resample_name(processor)),
        padding_value=int(value),
        rescale_factor=float(processor.rescale_factor) if processor.do_rescale else None,
        mean=_channels(processor.image_mean) if processor.do_normalize else None,
        std=_channels(processor.image_std) if processor.do_normalize else None,
    )


def _channels(value: Any) -> tuple[float, float, float]:  # transformers: one number, or three
    red, green, blue = value if isinstance(value, (list, tuple)) else (value,) * 3
    return float(red), float(green), float(blue)


def _patch_length(config: Any) -> int:
    return int(config.patch_size) ** 2 * int(config.num_channels)


def _patch_projector(config: Any) -> nn.Module:
    return nn.Linear(_patch_length(config), config.text_config.hidden_size)


def _store(checkpoint: Checkpoint, config: FuyuConfig, files: Sequence[WeightFile]) -> TensorStore:
    """The checkpoint's tensors under "connector." and "language_model."."""
    text = cast("PretrainedConfig", config.text_config)
    modules: dict[str, Callable[[], nn.Module]] = {
        "connector": lambda: _patch_projector(config),
        "language_model": lambda: causal_language_model(text, "eager"),
    }
    tied = bool(config.tie_word_embeddings)
    return module_store(checkpoint.path, modules, files, _RULES, has_tied_head=tied)


@dataclass(frozen=True, slots=True)
class _FuyuReference(WholeModel):
    """FuyuForCausalLM with FuyuProcessor, on the CPU."""

    model: Any  # of transformers, which share no static type with these parts
    processor: Any
    special_tokens: SpecialTokens

    def image_inputs(self, image: Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one RGB picture with transformers: image_patches [num_patches, length]."""
        inputs = self.greedy_inputs("", [image])
        return {"image_patches": to_numpy(inputs["pixel_values"])}

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a graph before the decoder computes; see `Reference.run`."""
        if graph == "projector":
            patches = torch.from_numpy(inputs["image_patches"]).to(self.model.dtype)
            features = self.model.model.get_image_features(patches, return_dict=True)
            return {"image_features": to_numpy(features.last_hidden_state)}
        embed = self.model.get_input_embeddings()
        return {"inputs_embeds": to_numpy(embed(torch.from_numpy(inputs["input_ids"])))}

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        [message] = messages
        inputs = self.greedy_inputs(message["content"], images)
        if "pixel_values" in inputs:  # the model does not cast them itself
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ids = inputs["input_ids"][0].numpy()
        return generated(
            self.model,
            self.processor.tokenizer,
            np.where(ids == self.special_tokens.image_token_id, IMAGE_TOKEN, ids),
            inputs,
            max_new_tokens,
            self.special_tokens.eos_token_ids,
        )

    def greedy_inputs(
        self, content: str | Sequence[dict[str, str]], images: Sequence[Image]
    ) -> dict[str, Any]:
        """What transformers' processor makes of one message: tensors for the model."""
        text = _processor_text(content)
        inputs = self.processor(
            text=[text],
            images=[list(images)] if images else None,
            return_tensors="pt",
            return_legacy_image_output=False,
        )
        if images and _LOCATION.search(text):
            inputs["input_ids"] = torch.tensor([self._located_ids(text, images)])
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        wanted = ("input_ids", "attention_mask", "pixel_values")
        return {name: inputs[name] for name in wanted if name in inputs}

    def _located_ids(self, text: str, images: Sequence[Image]) -> list[int]:
        """Token ids of a prompt with boxes or points.

        FuyuProcessor of transformers 5.23 computes the text with scaled coordinates, leaves it
        unused and joins the numbers of a box to one. This is its own code up to there and, for each
        number a token, that of transformers 4.57 (_transform_coordinates_and_tokenize).
        """
        own, tokenizer = self.processor, self.processor.tokenizer
        pictures, texts, *_ = own.prepare_inputs_layout(images=[list(images)], text=[text])
        found, rows = own._process_images(pictures, False, return_tensors="pt")
        [whole], _ = own.get_text_with_replacements(texts, rows)
        first, rest = re.split(r"(?<=<s>)", whole, maxsplit=1)
        ids: list[int] = tokenizer(first, add_special_tokens=False).input_ids[1:]
        tagged = processing_fuyu._replace_string_repr_with_token_tags(rest.removesuffix(_ANSWER))
        parts = processing_fuyu._segment_prompt_into_text_token_conversions(tagged)
        scale = found["image_scale_factors"][0][0].item()
        for part, is_location in parts:
            if is_location:
                ids += [tokenizer.get_vocab()[name] for name in _location_names(part, scale)]
            else:
                ids += tokenizer(part, add_special_tokens=False).input_ids
        return [*ids, tokenizer.get_vocab()[_ANSWER]]


def _location_names(location: str, scale: float) -> list[str]:
    numbers: Any = [*(float(number) for number in location.split(",")), scale]
    if len(numbers) == 3:
        values = processing_fuyu.scale_point_to_transformed_image(*numbers)
        return [_COORDINATES.point_open, *map(str, values), _COORDINATES.point_close]
    values = processing_fuyu.scale_bbox_to_transformed_image(*numbers)
    return [_COORDINATES.box_open, *map(str, values), _COORDINATES.box_close]


def _processor_text(content: str | Sequence[dict[str, str]]) -> str:
    """A message as FuyuProcessor takes it, which puts the first image's token in front itself."""
    if isinstance(content, str):
        return content
    texts = [part["text"] if part["type"] == "text" else _IMAGE for part in content]
    if _IMAGE in texts:
        texts.remove(_IMAGE)
    return "".join(texts)


FAMILY = Family(name="fuyu", model_types=("fuyu",), plan=_plan)
