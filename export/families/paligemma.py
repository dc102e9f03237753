"""PaliGemma: a SigLIP tower, a linear projector, Gemma (PaliGemma 1) or Gemma 2 (PaliGemma 2).

Graphs: vision_encoder, projector, embed_tokens, decoder; mask_decoder if the user gives its
weights. Layouts read: the key names of transformers 4.x, which all released checkpoints have, and
those of transformers 5's modules.

Sources: transformers models/paligemma; Beyer et al. 2024, "PaliGemma: A versatile 3B VLM for
transfer"; Steiner et al. 2024, "PaliGemma 2"; google-research/big_vision, proj/paligemma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from torch import nn

from vlmport.contract import (
    AttentionForm,
    GenerationDefaults,
    ImageTokens,
    LocationTokenAnswers,
    ModelDimensions,
    PromptFormat,
)
from vlmport.errors import CheckpointError, close_matches
from vlmport.export.checkpoint import Checkpoint, weight_files
from vlmport.export.family import ExportPlan, Family
from vlmport.export.parts import Parts, part_store
from vlmport.export.processor_files import (
    chat_template,
    fast_tokenizer,
    image_preprocessing,
    load_image_processor,
    load_tokenizer,
    special_tokens,
    suppressed_tokens,
)
from vlmport.export.reference import IMAGE_TOKEN, WholeModel
from vlmport.export.split_reference import generated, rendered, to_numpy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmport.contract import SpecialTokens
    from vlmport.export.reference import Reference, ReferenceAnswer
    from vlmport.export.weight_match import PrefixRule

__all__ = ["FAMILY"]

_PLACEHOLDER = "<image>"
_TOWER, _LM, _CONNECTOR = "vision_tower.", "language_model.", "connector."
# transformers/conversion_mapping.py (5.23), "llava" and "LlavaModel".
_RULES: tuple[PrefixRule, ...] = (
    ("model.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.", _TOWER),
    ("vision_tower.vision_model.", _TOWER),
    ("model.multi_modal_projector.linear.", _CONNECTOR),
    ("multi_modal_projector.linear.", _CONNECTOR),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_LANGUAGE_MODELS = ("gemma", "gemma2")
_TOWERS = ("siglip_vision_model",)

# A checkpoint without a chat template takes one turn of the user; other turns have no meaning.
_ONE_TURN = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('this model takes one message, of the user; it knows no system message "
    "and no earlier turns') }}{%- endif %}"
    "{%- if messages[0]['content'] is string %}{{ messages[0]['content'] }}"
    "{%- else %}{%- for part in messages[0]['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}"
)
# What PaliGemmaProcessor.prepare_inputs_layout does to the text: the beginning-of-sequence token
# goes behind the last image, a newline to the end. The empty expressions keep Jinja's trim_blocks
# and lstrip_blocks off the text inside.
_WRAPPED = (
    "{% set rendered %}{{ '' }}TEMPLATE{{ '' }}{% endset %}"
    "{% if '<image>' not in rendered %}{{ raise_exception('this model answers about pictures "
    "alone: found no image, expected one or more') }}{% endif %}"
    "{% set pieces = rendered.rsplit('<image>', 1) %}"
    "{{ pieces[0] + '<image>' + bos_token + pieces[1] + '\\n' }}"
)


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    config = _config(checkpoint)
    text: Any = config.text_config
    tower: Any = config.vision_config
    # Of the whole model, whose head is the one that is used.
    text.tie_word_embeddings = config.tie_word_embeddings
    parts = Parts(
        text,
        tower,
        feature_layer=None,
        drop_first_token=False,
        connector=lambda: nn.Linear(tower.hidden_size, text.hidden_size),
        connector_tokens=None,
        head_bias=False,
        is_bidirectional=True,
    )
    files = weight_files(checkpoint.path)
    store = part_store(checkpoint.path, parts, [(files, _RULES)])
    processor = _processor(checkpoint.path, tower, parts.image_tokens)
    tokenizer = processor.tokenizer
    tokens = special_tokens(checkpoint.path, tokenizer, config.image_token_id)
    _check_tokenizer(checkpoint.path, tokenizer, config.image_token_id, text.vocab_size)
    template = chat_template(checkpoint.path, tokenizer) or _ONE_TURN

    def reference(dtype: torch.dtype) -> Reference:
        return _Reference(
            transformers.PaliGemmaForConditionalGeneration.from_pretrained(
                checkpoint.path, dtype=dtype, local_files_only=True
            ).eval(),
            _untouched_processor(checkpoint.path, processor.image_processor),
            template,
            tokens,
        )

    return ExportPlan(
        variant=f"{text.model_type} + siglip, {tower.image_size} px, linear",
        layout="transformers",
        graphs=parts.graphs(),
        store=store,
        dimensions=ModelDimensions(text.hidden_size, text.vocab_size, text.max_position_embeddings),
        kv_layout=parts.kv_layout,
        attention=AttentionForm("bidirectional", first_position=1),
        image=image_preprocessing(
            processor.image_processor, pad_to_square=False, side=tower.image_size
        ),
        prompt=PromptFormat(
            chat_template=_WRAPPED.replace("TEMPLATE", template.removesuffix("\n")),
            image_placeholder=_PLACEHOLDER,
            image_tokens=ImageTokens("repeat", _PLACEHOLDER, parts.image_tokens, "", "", ""),
            tokenization="whole",
            add_special_tokens=True,
        ),
        special_tokens=tokens,
        generation=GenerationDefaults(256, (), suppressed_tokens(checkpoint.path)),
        tokenizer=fast_tokenizer(tokenizer),
        source_files=(checkpoint.path / "config.json", *(file.path for file in files)),
        reference=reference,
        answers=LocationTokenAnswers("location_tokens", 1024, 128, 16),
    )


def _config(checkpoint: Checkpoint) -> Any:  # the parts' configs are declared as dictionaries too
    settings = {k: v for k, v in checkpoint.config.items() if k != "model_type"}
    try:
        config: Any = transformers.PaliGemmaConfig(**settings)
    except Exception as error:  # a validation error of huggingface_hub, KeyError, TypeError, ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        msg = (
            f"{checkpoint.path}/config.json: transformers refuses it ({' '.join(lines)}); "
            "expected the config.json that belongs to the checkpoint; download it again"
        )
        raise CheckpointError(msg) from error
    for name, found, known in (
        ("text_config", config.text_config.model_type, _LANGUAGE_MODELS),
        ("vision_config", config.vision_config.model_type, _TOWERS),
    ):
        if found not in known:
            hint = close_matches(found, known)
            msg = f"{checkpoint.path}/config.json: {name} of model_type {found!r}; {hint}"
            raise CheckpointError(msg)
    if config.projection_dim != config.text_config.hidden_size:
        msg = (
            f"{checkpoint.path}/config.json: projection_dim {config.projection_dim}; expected "
            f"text_config.hidden_size, {config.text_config.hidden_size}; download it again"
        )
        raise CheckpointError(msg)
    return config


def _processor(folder: Path, tower: Any, image_tokens: int) -> Any:
    """Transformers' processor around a tokenizer that the bundle can take over.

    It adds the tokens that a checkpoint's tokenizer lacks, and takes the automatic
    beginning-of-sequence token away.
    """
    image_processor = load_image_processor(folder, tower.model_type, tower.image_size)
    found = getattr(image_processor, "image_seq_length", None)
    if found is None:
        image_processor.image_seq_length = image_tokens
    elif found != image_tokens:
        msg = (
            f"{folder}/preprocessor_config.json: image_seq_length {found}; the vision tower makes "
            f"{image_tokens} tokens of {tower.image_size} pixels (config.json); one of the two "
            "files does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    return transformers.PaliGemmaProcessor(
        image_processor=image_processor, tokenizer=cast("Any", load_tokenizer(folder))
    )


def _untouched_processor(folder: Path, image_processor: Any) -> Any:
    """The processor with the tokenizer class that the checkpoint itself names."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return transformers.PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)


def _check_tokenizer(folder: Path, tokenizer: Any, image_token_id: int, vocab_size: int) -> None:
    found = tokenizer.convert_tokens_to_ids(_PLACEHOLDER)
    if found != image_token_id:
        msg = (
            f"{folder}: {_PLACEHOLDER!r} is token {found} of the tokenizer; expected "
            f"{image_token_id} (config.json: image_token_index); the tokenizer does not belong to "
            "this checkpoint"
        )
        raise CheckpointError(msg)
    # The image token's embedding is never used, so it alone may lie outside of the table.
    highest = max(token for token in tokenizer.get_vocab().values() if token != image_token_id)
    if highest >= vocab_size:
        msg = (
            f"{folder}: the tokenizer, with the <loc> and <seg> tokens, goes up to token "
            f"{highest}; expected at most {vocab_size - 1} (text_config.vocab_size); the "
            "tokenizer does not belong to this checkpoint"
        )
        raise CheckpointError(msg)


@dataclass(frozen=True, slots=True)
class _Reference(WholeModel):
    """transformers' model and processor, on the CPU.

    Attributes:
        model: PaliGemmaForConditionalGeneration.
        processor: PaliGemmaProcessor.
        template: renders a chat to the text that the processor is given.
        special_tokens: ids with a meaning.
    """

    model: Any
    processor: Any
    template: str
    special_tokens: SpecialTokens

    def image_inputs(self, image: Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one RGB picture with transformers' image processor."""
        pixels = self.processor.image_processor([image], return_tensors="np")["pixel_values"]
        return {"pixel_values": np.asarray(pixels, np.float32)}

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a graph before the decoder computes; see `Reference.run`."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        body = self.model.model
        if graph == "vision_encoder":
            hidden = body.vision_tower(tensors["pixel_values"]).last_hidden_state
            return {"vision_features": to_numpy(hidden)}
        if graph == "projector":
            projected = body.multi_modal_projector(tensors["vision_features"].to(self.model.dtype))
            return {"image_features": to_numpy(projected)}
        embed = self.model.get_input_embeddings()
        return {"inputs_embeds": to_numpy(embed(tensors["input_ids"]))}

    @torch.no_grad()
    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`."""
        text = rendered(self.processor.tokenizer, messages, self.template)
        inputs = self.processor(text=[text], images=[list(images)], return_tensors="pt")
        ids = inputs["input_ids"][0].numpy().astype(np.int64)
        # Without token_type_ids the model's mask depends on padding and on the attention function
        # (measured: bidirectional with sdpa, causal with eager).
        wanted = ("input_ids", "attention_mask", "pixel_values", "token_type_ids")
        return generated(
            self.model,
            self.processor.tokenizer,
            np.where(ids == self.special_tokens.image_token_id, IMAGE_TOKEN, ids),
            {name: inputs[name] for name in wanted},
            max_new_tokens,
            self.special_tokens.eos_token_ids,
        )


FAMILY = Family(name="paligemma", model_types=("paligemma",), plan=_plan)
