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

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers.activations import ACT2FN

from vlmport.contract import (
    ImageTokens,
    PromptFormat,
)
from vlmport.errors import CheckpointError, ExportError, close_matches
from vlmport.export.adapters import (
    ADAPTER_CONFIG,
    adapter_files,
    merge_adapters,
    without_wrappers,
)
from vlmport.export.checkpoint import Checkpoint, weight_files
from vlmport.export.connectors import INTERLEAVED, Connector, choose_connector
from vlmport.export.family import ExportPlan, Family
from vlmport.export.hf_reference import WholeModelReference
from vlmport.export.key_prefixes import (
    LANGUAGE_MODEL,
    LLAVA_PARTS,
    SEPARATE_FOLDERS,
    TOWER,
    TOWER_2,
    UNDERSCORED_PARTS,
    UNIFIED_MODEL,
)
from vlmport.export.parts import Parts, match_parts
from vlmport.export.parts_plan import PartsPlan
from vlmport.export.processor_files import (
    chat_template,
    load_image_processor,
    processed_size,
    special_tokens,
)
from vlmport.export.prompt_templates import (
    PLACEHOLDER,
    PROMPT_TEMPLATES,
    TURN_ENDS,
    role_lines_template,
    template_name,
)
from vlmport.export.split_reference import SplitReference, load_module
from vlmport.export.towers import current_names, known_tower, paired_tower, seen_side, tower_config
from vlmport.export.weight_match import collect_tensors
from vlmport.export.wrappers.connectors import mlp_connector
from vlmport.export.wrappers.vision import num_vision_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from vlmport.contract import SpecialTokens
    from vlmport.export.reference import Reference
    from vlmport.export.tensor_store import WeightFile

__all__ = ["FAMILY"]

# TinyLLaVABench's model types, by the language model that their config extends.
_BENCH_TYPES = {
    "tiny_llava_llama": "llama",
    "tiny_llava_phi": "phi",
    "tiny_llava_stablelm": "stablelm",
}
# TinyLLaVABench finetuned this tower and names its copies "...-SigLIP".
_BENCH_SIGLIP = "google/siglip-so400m-patch14-384"
_LANGUAGE_MODELS = ("gemma", "llama", "phi", "qwen2", "stablelm")


@dataclass(frozen=True, slots=True)
class _Choices:
    """What a layout's config says, in one form for all of them.

    Attributes:
        layout: name of the layout.
        text: config of the language model.
        tower: config of the vision tower.
        second_tower: config of the second tower of a mixture of features.
        connector: its kind.
        layer: index into the tower's hidden states.
        select: "patch" leaves token 0 out, "cls_patch" keeps it.
    """

    layout: str
    text: PretrainedConfig
    tower: PretrainedConfig
    second_tower: PretrainedConfig | None
    connector: str
    layer: int
    select: str


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    if checkpoint.model_type == "llava":
        return _plan_transformers(checkpoint)
    if checkpoint.model_type in _BENCH_TYPES:
        return _plan_factory(checkpoint, _bench_choices(checkpoint))
    return _plan_factory(checkpoint, _factory_choices(checkpoint))


def _bench_choices(checkpoint: Checkpoint) -> _Choices:
    text = _language_config(checkpoint, checkpoint.config, _BENCH_TYPES[checkpoint.model_type])
    named = str(checkpoint.needed("mm_vision_tower"))
    is_copy = named.lower().endswith("-siglip")
    tower = known_tower(checkpoint.path, _BENCH_SIGLIP if is_copy else named)
    names = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
    kind, layer, select = (checkpoint.needed(name) for name in names)
    return _Choices("bench", text, tower, None, str(kind), int(layer), str(select))


def _factory_choices(checkpoint: Checkpoint) -> _Choices:
    config, path = checkpoint.config, checkpoint.path
    text_section = checkpoint.section("text_config")
    text = _language_config(checkpoint, text_section, str(text_section.get("model_type", "")))
    vision_section = checkpoint.section("vision_config")
    tower = tower_config(path, vision_section)
    kind = str(checkpoint.needed("connector_type"))
    named = str(config.get("vision_model_name_or_path") or "")
    second = None
    # Factory finds its tower class by the part of the name before a colon: "mof:openai/clip-...".
    if "mof" in named.split(":")[0].lower() or kind == INTERLEAVED:
        beside = vision_section.get("model_name_or_path2")
        beside = beside or config.get("vision_model_name_or_path2")
        second = paired_tower(path, tower, str(beside or "").split(":")[-1])
        if kind != INTERLEAVED:
            msg = f"{path}/config.json: connector {kind!r} for two towers; expected {INTERLEAVED!r}"
            raise CheckpointError(msg)
    is_separate = (path / "language_model").is_dir()
    layout = "factory-separate" if is_separate else "factory-merged"
    if (path / ADAPTER_CONFIG).is_file():
        layout += ", LoRA"
    layer = int(config.get("vision_feature_layer", -2))
    select = str(config.get("vision_feature_select_strategy", "patch"))
    return _Choices(layout, text, tower, second, kind, layer, select)


def _plan_factory(checkpoint: Checkpoint, choices: _Choices) -> ExportPlan:
    text, tower = choices.text, choices.tower
    aspect = _image_aspect(checkpoint)
    if choices.select not in ("patch", "cls_patch"):
        msg = (
            f"{checkpoint.path}/config.json: vision_feature_select_strategy {choices.select!r}; "
            "known: patch, cls_patch"
        )
        raise CheckpointError(msg)
    found, files = _factory_tensors(checkpoint, choices)
    processor = load_image_processor(checkpoint.path, tower.model_type, tower.image_size)
    side = seen_side(tower, processed_size(processor))
    lengths = (int(tower.hidden_size), int(text.hidden_size))
    patches = num_vision_tokens(tower, drop_first_token=choices.select == "patch", side=side)
    connector = choose_connector(checkpoint, choices.connector, lengths, patches, found)
    parts = _factory_parts(choices, connector, side)
    store = match_parts(checkpoint.path, parts, found)
    plan = PartsPlan(checkpoint, parts, processor, store, files, pads=aspect == "pad")
    prompt, special = _factory_prompt(checkpoint, plan)

    def reference(dtype: torch.dtype) -> Reference:
        second = None
        if parts.second_tower is not None:
            build = partial(parts.build_tower, "vision_tower_2")
            second = load_module(build, TOWER_2, store, dtype)
        return SplitReference(
            image_processor=processor,
            pad_colour=plan.image.pad_to_square,
            vision_tower=load_module(parts.build_tower, TOWER, store, dtype),
            feature_layer=choices.layer,
            drop_first_token=parts.drop_first_token,
            connector=connector.reference(store, dtype),
            language_model=load_module(parts.build_language_model, LANGUAGE_MODEL, store, dtype),
            tokenizer=plan.tokenizer,
            prompt=prompt,
            special_tokens=special,
            second_tower=second,
            image_scale=parts.image_scale,
        )

    towers = _short(tower) if parts.second_tower is None else f"{_short(tower)} + dinov2"
    parts_named = f"{text.model_type} + {towers}, {choices.connector}, {aspect}, {choices.select}"
    return plan.finish(choices.layout, parts_named, prompt, special, reference)


def _factory_parts(choices: _Choices, connector: Connector, side: int) -> Parts:
    text = choices.text
    return Parts(
        text,
        choices.tower,
        choices.layer,
        choices.select == "patch",
        connector.build,
        connector.tokens,
        head_bias=True,
        second_tower=choices.second_tower,
        side=side,
        # transformers 4, which these checkpoints were trained with, scaled Gemma's inputs_embeds
        # in the decoder, image features among them; transformers 5 scales in the embedding.
        image_scale=text.hidden_size**0.5 if text.model_type == "gemma" else None,
    )


def _factory_tensors(
    checkpoint: Checkpoint, choices: _Choices
) -> tuple[dict[str, tuple[WeightFile, str]], list[WeightFile]]:
    """(tensors under parameter names, adapters merged; the files that they come from)."""
    path = checkpoint.path
    merged_rules = UNIFIED_MODEL if choices.layout == "bench" else UNDERSCORED_PARTS
    if (path / "language_model").is_dir():
        groups = [(weight_files(path / name), rules) for name, rules in SEPARATE_FOLDERS.items()]
    else:
        groups = [(weight_files(path), merged_rules)]
    found: dict[str, tuple[WeightFile, str]] = {}
    for files, rules in groups:
        found |= without_wrappers(collect_tensors(files, rules))
    adapter = adapter_files(path)
    found = merge_adapters(path, found, adapter, merged_rules)
    if choices.second_tower is not None:
        found = current_names(found, (TOWER_2,))
    elif choices.tower.model_type == "dinov2":
        found = current_names(found, (TOWER,))
    return found, [*(file for files, _ in groups for file in files), *adapter]


def _image_aspect(checkpoint: Checkpoint) -> str:
    aspect = str(checkpoint.config.get("image_aspect_ratio") or "square")
    if aspect in ("square", "pad"):
        return aspect
    reason = (
        "Factory cuts such pictures into tiles but hands them to its tower as one tensor of five "
        "axes, which the tower refuses, so there is no model to reproduce"
        if aspect == "anyres"
        else "Factory has no such preprocessing"
    )
    msg = (
        f"{checkpoint.path}/config.json: image_aspect_ratio {aspect!r} is not supported: {reason}; "
        "available: square, pad"
    )
    raise CheckpointError(msg)


def _factory_prompt(checkpoint: Checkpoint, plan: PartsPlan) -> tuple[PromptFormat, SpecialTokens]:
    """The template of the training scripts, and what ends an answer under it."""
    special = special_tokens(checkpoint.path, plan.tokenizer, None)
    named = str(checkpoint.config.get("llm_model_name_or_path") or "")
    derived = template_name(plan.parts.text.model_type, named, special.eos_token)
    name = checkpoint.prompt_template or derived
    # Factory stops at the template's end too, by its text.
    end = cast("Any", plan.tokenizer).get_vocab().get(TURN_ENDS[name])
    if end is not None and end not in special.eos_token_ids:
        special = replace(special, eos_token_ids=(*special.eos_token_ids, end))
    limit = checkpoint.config.get("tokenizer_model_max_length")
    tokens = ImageTokens("repeat", "", plan.parts.image_tokens, "", "", "")
    kept = None if limit is None or limit >= plan.max_length else int(limit)
    form = PromptFormat(
        *(PROMPT_TEMPLATES[name], PLACEHOLDER, tokens, "chunks", True), kept_with_images=kept
    )
    return form, special


def _plan_transformers(checkpoint: Checkpoint) -> ExportPlan:
    if checkpoint.prompt_template is not None:
        msg = (
            f"{checkpoint.path}: a checkpoint of this layout brings its own prompt form; leave "
            "--prompt-template out"
        )
        raise ExportError(msg)
    config = transformers.LlavaConfig(**_without_model_type(checkpoint.config))
    parts = _transformers_parts(checkpoint, config)
    tower, strategy = parts.tower, config.vision_feature_select_strategy
    processor = load_image_processor(checkpoint.path, tower.model_type, tower.image_size)
    files = weight_files(checkpoint.path)
    store = match_parts(checkpoint.path, parts, collect_tensors(files, LLAVA_PARTS))
    pads = bool(getattr(processor, "do_pad", False))
    plan = PartsPlan(checkpoint, parts, processor, store, files, pads=pads)
    tokenizer = plan.tokenizer
    tokens = special_tokens(checkpoint.path, tokenizer, config.image_token_index)
    placeholder = tokenizer.convert_ids_to_tokens(config.image_token_index)
    if not isinstance(placeholder, str):
        msg = (
            f"{checkpoint.path}: image_token_index {config.image_token_index} is not in the "
            "tokenizer; the tokenizer does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    template = chat_template(checkpoint.path, tokenizer)
    template = template or role_lines_template(placeholder)
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

    kind = f"mlp2x_{config.projector_hidden_act}"
    variant = f"{parts.text.model_type} + {_short(tower)}, {kind}, {strategy}"
    return plan.finish("transformers", variant, prompt, tokens, reference)


def _transformers_parts(checkpoint: Checkpoint, config: transformers.LlavaConfig) -> Parts:
    # The config class declares them as dictionaries too, which it turns into configs.
    text: Any = config.text_config
    tower: Any = config.vision_config
    _check_language_model(checkpoint, text.model_type)
    layers, activation = config.vision_feature_layer, str(config.projector_hidden_act)
    if activation not in ACT2FN:
        msg = (
            f"{checkpoint.path}/config.json: projector_hidden_act {activation!r}; "
            f"{close_matches(activation, list(ACT2FN))}"
        )
        raise CheckpointError(msg)
    vision_length = tower.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return Parts(
        text,
        tower,
        layers,
        config.vision_feature_select_strategy == "default",
        lambda: mlp_connector(
            vision_length,
            text.hidden_size,
            2,
            bias=config.multimodal_projector_bias,
            activation=lambda: ACT2FN[activation],
        ),
        None,
        head_bias=False,  # LlavaForConditionalGeneration builds its head without one
    )


def _language_config(
    checkpoint: Checkpoint, section: dict[str, Any], model_type: str
) -> PretrainedConfig:
    _check_language_model(checkpoint, model_type)
    return transformers.AutoConfig.for_model(model_type, **_without_model_type(section))


def _check_language_model(checkpoint: Checkpoint, model_type: str) -> None:
    if model_type == "openelm":
        msg = (
            f"{checkpoint.path}/config.json: language model 'openelm' is not supported: "
            f"transformers {transformers.__version__} has no OpenELM, only code that its "
            "checkpoints bring along, which is not run"
        )
        raise CheckpointError(msg)
    if model_type not in _LANGUAGE_MODELS:
        msg = (
            f"{checkpoint.path}/config.json: language model {model_type!r} is not supported; "
            f"{close_matches(model_type, _LANGUAGE_MODELS)}"
        )
        raise CheckpointError(msg)


def _without_model_type(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "model_type"}


def _short(tower: PretrainedConfig) -> str:
    return str(tower.model_type).removesuffix("_vision_model")


FAMILY = Family(
    name="tinyllava",
    model_types=("tinyllava", "llava", *_BENCH_TYPES),
    plan=_plan,
    prompt_templates=tuple(PROMPT_TEMPLATES),
)
