"""TinyLLaVA and LLaVA: a SigLIP or CLIP tower, a connector, a causal language model.

Graphs: vision_encoder, projector, embed_tokens, decoder. Layouts read:
  factory-merged    TinyLLaVA_Factory after finetuning, and its released models
  factory-separate  TinyLLaVA_Factory after pretraining: one folder for each part
  bench             the older TinyLLaVABench (keys model.mm_projector.*)
  transformers      LlavaForConditionalGeneration

Sources: https://github.com/TinyLLaVA/TinyLLaVA_Factory (tinyllava/model, tinyllava/data),
https://github.com/DLCV-BUAA/TinyLLaVABench, transformers models/llava; Zhou et al. 2024,
"TinyLLaVA: A Framework of Small-scale Large Multimodal Models".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from vlmport.contract import (
    AttentionForm,
    GenerationDefaults,
    ImageTokens,
    ModelDimensions,
    PromptFormat,
)
from vlmport.errors import CheckpointError, close_matches
from vlmport.export.checkpoint import Checkpoint, weight_files
from vlmport.export.family import ExportPlan, Family
from vlmport.export.hf_reference import WholeModelReference
from vlmport.export.parts import Parts, part_store
from vlmport.export.processor_files import (
    chat_template,
    fast_tokenizer,
    image_preprocessing,
    load_image_processor,
    load_tokenizer,
    special_tokens,
)
from vlmport.export.split_reference import SplitReference, load_module
from vlmport.export.towers import known_tower, tower_config
from vlmport.export.wrappers.connectors import PerceiverResampler, mlp_connector

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PretrainedConfig

    from vlmport.contract import SpecialTokens
    from vlmport.export.reference import Reference
    from vlmport.export.tensor_store import WeightFile
    from vlmport.export.weight_match import PrefixRule

__all__ = ["FAMILY"]

# tinyllava/data/template/base.py; the templates of all language models differ in eos_token alone.
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# A turn with pictures starts with one placeholder line for each; Factory itself takes one.
_FACTORY_TEMPLATE = (
    "{{ '" + _SYSTEM.replace("'", "\\'") + "' }}"
    "{%- for message in messages %}"
    "{%- set turn = namespace(images='', text='') %}"
    "{%- if message['content'] is string %}{% set turn.text = message['content'] %}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{% set turn.images = turn.images + '<image>\\n' %}"
    "{%- else %}{% set turn.text = turn.text + part['text'] %}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if turn.images %}{% set turn.text = (turn.images + turn.text | trim) | trim %}{%- endif %}"
    "{{ 'USER: ' + turn.text + ' ' }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + turn.text + eos_token }}"
    "{%- else %}{{ raise_exception('this prompt form has a system message of its own; "
    "found a message of role ' + message['role']) }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
)
_PLACEHOLDER = "<image>"
# For LlavaForConditionalGeneration checkpoints without a chat template: the form of LLaVA 1.5.
_BARE_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ message['role'] | upper + ': ' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
)

_TOWER, _LM = "vision_tower.", "language_model."
_MERGED: tuple[PrefixRule, ...] = (
    ("vision_tower._vision_tower.vision_model.", _TOWER),
    ("vision_tower._vision_tower.", _TOWER),
    ("connector._connector.", "connector."),
)
_SEPARATE: dict[str, tuple[PrefixRule, ...]] = {
    "language_model": (("", _LM),),
    "vision_tower": (
        ("_vision_tower.vision_model.", _TOWER),
        ("_vision_tower.", _TOWER),
        ("vision_model.", _TOWER),
        ("", _TOWER),
    ),
    "connector": (("_connector.", "connector."), ("", "connector.")),
}
_BENCH: tuple[PrefixRule, ...] = (
    ("model.vision_tower.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.vision_tower.", _TOWER),
    ("model.mm_projector.", "connector."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_HF_PROJECTOR = (("linear_1.", "connector.0."), ("linear_2.", "connector.2."))
_TRANSFORMERS: tuple[PrefixRule, ...] = (
    ("model.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.", _TOWER),
    ("vision_tower.vision_model.", _TOWER),
    *((f"{m}multi_modal_projector.{o}", n) for m in ("model.", "") for o, n in _HF_PROJECTOR),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

# TinyLLaVABench's model types, by the language model that their config extends.
_BENCH_TYPES = {
    "tiny_llava_llama": "llama",
    "tiny_llava_phi": "phi",
    "tiny_llava_stablelm": "stablelm",
}
# TinyLLaVABench finetuned this tower and names its copies "...-SigLIP".
_BENCH_SIGLIP = "google/siglip-so400m-patch14-384"
_CONNECTORS = ("linear", "mlp2x_gelu", "mlp3x_gelu", "resampler")
_LANGUAGE_MODELS = ("llama", "phi", "stablelm")


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    config = checkpoint.config
    if checkpoint.model_type == "llava":
        return _plan_transformers(checkpoint)
    if checkpoint.model_type in _BENCH_TYPES:
        text = _language_config(checkpoint, config, _BENCH_TYPES[checkpoint.model_type])
        named = str(_needed(checkpoint, "mm_vision_tower"))
        is_copy = named.lower().endswith("-siglip")
        tower = known_tower(checkpoint.path, _BENCH_SIGLIP if is_copy else named)
        names = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
        kind, layer, select = (_needed(checkpoint, name) for name in names)
        return _plan_factory(checkpoint, "bench", text, tower, str(kind), int(layer), str(select))
    text_section = _section(checkpoint, "text_config")
    text = _language_config(checkpoint, text_section, str(text_section.get("model_type", "")))
    tower = tower_config(checkpoint.path, _section(checkpoint, "vision_config"))
    separate = (checkpoint.path / "language_model").is_dir()
    layout = "factory-separate" if separate else "factory-merged"
    kind = str(_needed(checkpoint, "connector_type"))
    layer = int(config.get("vision_feature_layer", -2))
    select = str(config.get("vision_feature_select_strategy", "patch"))
    return _plan_factory(checkpoint, layout, text, tower, kind, layer, select)


def _plan_factory(
    checkpoint: Checkpoint,
    layout: str,
    text: PretrainedConfig,
    tower: PretrainedConfig,
    connector_kind: str,
    layer: int,
    select: str,
) -> ExportPlan:
    if select not in ("patch", "cls_patch"):
        msg = (
            f"{checkpoint.path}/config.json: vision_feature_select_strategy {select!r}; "
            "known: patch, cls_patch"
        )
        raise CheckpointError(msg)
    aspect = str(checkpoint.config.get("image_aspect_ratio") or "square")
    if aspect not in ("square", "pad"):
        msg = (
            f"{checkpoint.path}/config.json: image_aspect_ratio {aspect!r} is not supported yet; "
            "available: square, pad"
        )
        raise CheckpointError(msg)
    connector, tokens_out = _connector(checkpoint, connector_kind, tower, text)
    parts = Parts(text, tower, layer, select == "patch", connector, tokens_out, head_bias=True)
    tokens = ImageTokens("repeat", "", parts.image_tokens, "", "", "")
    prompt = PromptFormat(_FACTORY_TEMPLATE, _PLACEHOLDER, tokens, "chunks", True)
    if layout == "factory-separate":
        groups = [(weight_files(checkpoint.path / n), r) for n, r in _SEPARATE.items()]
    else:
        groups = [(weight_files(checkpoint.path), _BENCH if layout == "bench" else _MERGED)]
    processor = load_image_processor(checkpoint.path, tower.model_type, tower.image_size)
    shared = _Shared(checkpoint, parts, processor, groups, pads=aspect == "pad")
    special = special_tokens(checkpoint.path, shared.tokenizer, None)

    def reference(dtype: torch.dtype) -> Reference:
        return SplitReference(
            image_processor=processor,
            pad_colour=shared.image.pad_to_square,
            vision_tower=load_module(parts.build_tower, _TOWER, shared.store, dtype),
            feature_layer=layer,
            drop_first_token=parts.drop_first_token,
            connector=load_module(connector, "connector.", shared.store, dtype),
            language_model=load_module(parts.build_language_model, _LM, shared.store, dtype),
            tokenizer=shared.tokenizer,
            prompt=prompt,
            special_tokens=special,
        )

    variant = f"{text.model_type} + {_short(tower)}, {connector_kind}, {aspect}, {select}"
    limit = checkpoint.config.get("tokenizer_model_max_length")
    return shared.plan(layout, variant, prompt, special, limit, reference)


def _plan_transformers(checkpoint: Checkpoint) -> ExportPlan:
    config = transformers.LlavaConfig(**_without_model_type(checkpoint.config))
    # The config class declares them as dictionaries too, which it turns into configs.
    text: Any = config.text_config
    tower: Any = config.vision_config
    _check_language_model(checkpoint, text.model_type)
    strategy = config.vision_feature_select_strategy
    if not isinstance(config.vision_feature_layer, int) or config.projector_hidden_act != "gelu":
        msg = (
            f"{checkpoint.path}/config.json: vision_feature_layer {config.vision_feature_layer} "
            f"and projector_hidden_act {config.projector_hidden_act!r}; supported are one layer "
            "and 'gelu'"
        )
        raise CheckpointError(msg)
    parts = Parts(
        text,
        tower,
        config.vision_feature_layer,
        strategy == "default",
        lambda: mlp_connector(
            tower.hidden_size, text.hidden_size, 2, bias=config.multimodal_projector_bias
        ),
        None,
        head_bias=False,  # LlavaForConditionalGeneration builds its head without one
    )
    processor = load_image_processor(checkpoint.path, tower.model_type, tower.image_size)
    groups = [(weight_files(checkpoint.path), _TRANSFORMERS)]
    pads = bool(getattr(processor, "do_pad", False))
    shared = _Shared(checkpoint, parts, processor, groups, pads=pads)
    tokenizer = shared.tokenizer
    tokens = special_tokens(checkpoint.path, tokenizer, config.image_token_index)
    placeholder = tokenizer.convert_ids_to_tokens(config.image_token_index)
    if not isinstance(placeholder, str):
        msg = (
            f"{checkpoint.path}: image_token_index {config.image_token_index} is not in the "
            "tokenizer; the tokenizer does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    template = chat_template(checkpoint.path, tokenizer)
    template = template or _BARE_TEMPLATE.replace(_PLACEHOLDER, placeholder)
    image_tokens = ImageTokens("repeat", placeholder, parts.image_tokens, "", "", "")
    prompt = PromptFormat(template, placeholder, image_tokens, "whole", add_special_tokens=True)

    def reference(dtype: torch.dtype) -> Reference:
        return WholeModelReference(
            transformers.LlavaForConditionalGeneration.from_pretrained(
                checkpoint.path, dtype=dtype, local_files_only=True
            ).eval(),
            transformers.LlavaProcessor(
                image_processor=processor,
                tokenizer=tokenizer,
                patch_size=tower.patch_size,
                vision_feature_select_strategy=strategy,
                image_token=placeholder,
                num_additional_image_tokens=int(tower.model_type == "clip_vision_model"),
            ),
            prompt,
            tokens,
        )

    variant = f"{text.model_type} + {_short(tower)}, mlp2x_gelu, {strategy}"
    return shared.plan("transformers", variant, prompt, tokens, None, reference)


class _Shared:
    """What all layouts read in the same way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: Parts,
        processor: Any,  # transformers' image processors share no useful static type
        groups: list[tuple[list[WeightFile], tuple[PrefixRule, ...]]],
        *,
        pads: bool,
    ) -> None:
        side: int = parts.tower.image_size
        self._parts = parts
        self.tokenizer = load_tokenizer(checkpoint.path)
        self.image = image_preprocessing(processor, pad_to_square=pads, side=side)
        self.store = part_store(checkpoint.path, parts, groups)
        weights = [file.path for files, _ in groups for file in files]
        self._source_files = (checkpoint.path / "config.json", *weights)

    def plan(
        self,
        layout: str,
        variant: str,
        prompt: PromptFormat,
        tokens: SpecialTokens,
        max_length: int | None,
        reference: Callable[[torch.dtype], Reference],
    ) -> ExportPlan:
        """The plan, with what the layout decided."""
        parts, text = self._parts, self._parts.text
        limit = min(max_length or text.max_position_embeddings, text.max_position_embeddings)
        return ExportPlan(
            variant=variant,
            layout=layout,
            graphs=parts.graphs(),
            store=self.store,
            dimensions=ModelDimensions(text.hidden_size, text.vocab_size, limit),
            kv_layout=parts.kv_layout,
            attention=AttentionForm("causal", first_position=0),
            image=self.image,
            prompt=prompt,
            special_tokens=tokens,
            generation=GenerationDefaults(max_new_tokens=256, stop_strings=()),
            tokenizer=fast_tokenizer(self.tokenizer),
            source_files=self._source_files,
            reference=reference,
        )


def _connector(
    checkpoint: Checkpoint, kind: str, tower: PretrainedConfig, text: PretrainedConfig
) -> tuple[Callable[[], nn.Module], int | None]:
    """(makes the connector, image tokens if they are not those of the tower)."""
    vision, hidden = int(tower.hidden_size), int(text.hidden_size)
    if kind == "linear":
        return (lambda: nn.Linear(vision, hidden)), None
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if depth:
        return (lambda: mlp_connector(vision, hidden, int(depth.group(1)))), None
    if kind == "resampler":
        queries = int(checkpoint.config.get("num_queries") or 128)
        layers = int(checkpoint.config.get("num_resampler_layers") or 3)
        return (lambda: PerceiverResampler(vision, hidden, queries, layers)), queries
    msg = (
        f"{checkpoint.path}/config.json: connector {kind!r} is not supported; "
        f"{close_matches(kind, _CONNECTORS)}"
    )
    raise CheckpointError(msg)


def _language_config(
    checkpoint: Checkpoint, section: dict[str, Any], model_type: str
) -> PretrainedConfig:
    _check_language_model(checkpoint, model_type)
    return transformers.AutoConfig.for_model(model_type, **_without_model_type(section))


def _check_language_model(checkpoint: Checkpoint, model_type: str) -> None:
    if model_type not in _LANGUAGE_MODELS:
        msg = (
            f"{checkpoint.path}/config.json: language model {model_type!r} is not supported; "
            f"{close_matches(model_type, _LANGUAGE_MODELS)}"
        )
        raise CheckpointError(msg)


def _needed(checkpoint: Checkpoint, name: str) -> Any:
    if checkpoint.config.get(name) is None:
        msg = (
            f"{checkpoint.path}/config.json: has no {name!r}; expected the config.json that the "
            "training run wrote"
        )
        raise CheckpointError(msg)
    return checkpoint.config[name]


def _section(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    section = _needed(checkpoint, name)
    if not isinstance(section, dict):
        msg = f"{checkpoint.path}/config.json: {name!r} is not an object; download it again"
        raise CheckpointError(msg)
    return section


def _without_model_type(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "model_type"}


def _short(tower: PretrainedConfig) -> str:
    return str(tower.model_type).removesuffix("_vision_model")


FAMILY = Family(
    name="tinyllava",
    model_types=("tinyllava", "llava", *_BENCH_TYPES),
    plan=_plan,
)
