"""A family in one file: a SigLIP tower, a linear projector and Llama, under model_type "toy_vlm".

The page docs/families/adding.md explains it; the tests use it as a file and as an installed
distribution. Weights are named tower.*, projector.* and text.*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import LlamaConfig, SiglipVisionConfig

from vlmport.contract import (
    AttentionForm,
    GenerationDefaults,
    ImageTokens,
    ModelDimensions,
    PromptFormat,
)
from vlmport.export.checkpoint import Checkpoint, weight_files
from vlmport.export.family import ExportPlan, Family
from vlmport.export.parts import Parts, part_store
from vlmport.export.processor_files import (
    fast_tokenizer,
    image_preprocessing,
    load_image_processor,
    load_tokenizer,
    special_tokens,
)
from vlmport.export.split_reference import SplitReference, load_module

if TYPE_CHECKING:
    import torch

    from vlmport.export.reference import Reference

__all__ = ["FAMILY"]

_TEMPLATE = (
    "{%- for message in messages %}{{ message['role'] + ': ' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}{{ '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant:' }}{%- endif %}"
)
# Prefix in the checkpoint -> prefix among the parameters of the three parts.
_RULES = (
    ("tower.", "vision_tower."),
    ("projector.", "connector."),
    ("text.", "language_model."),
)


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    text = LlamaConfig(**checkpoint.config["text_config"])
    tower = SiglipVisionConfig(**checkpoint.config["vision_config"])
    side = int(checkpoint.config["vision_config"]["image_size"])

    def connector() -> nn.Module:
        return nn.Linear(tower.hidden_size, text.hidden_size)

    # hidden_states[-1]: the features of the last layer, all of them, as many tokens as patches.
    parts = Parts(text, tower, -1, False, connector, None, head_bias=False)
    files = weight_files(checkpoint.path)
    store = part_store(checkpoint.path, parts, [(files, _RULES)])
    processor = load_image_processor(checkpoint.path, tower.model_type, side)
    tokenizer = load_tokenizer(checkpoint.path)
    tokens = special_tokens(checkpoint.path, tokenizer, None)
    image_tokens = ImageTokens("repeat", "", parts.image_tokens, "", "", "")
    prompt = PromptFormat(_TEMPLATE, "<image>", image_tokens, "chunks", add_special_tokens=True)

    def reference(dtype: torch.dtype) -> Reference:
        return SplitReference(
            image_processor=processor,
            pad_colour=None,
            vision_tower=load_module(parts.build_tower, "vision_tower.", store, dtype),
            feature_layer=-1,
            drop_first_token=False,
            connector=load_module(connector, "connector.", store, dtype),
            language_model=load_module(parts.build_language_model, "language_model.", store, dtype),
            tokenizer=tokenizer,
            prompt=prompt,
            special_tokens=tokens,
        )

    return ExportPlan(
        variant="llama + siglip, linear",
        layout="toy",
        graphs=parts.graphs(),
        store=store,
        dimensions=ModelDimensions(text.hidden_size, text.vocab_size, text.max_position_embeddings),
        kv_layout=parts.kv_layout,
        attention=AttentionForm("causal", first_position=0),
        image=image_preprocessing(processor, pad_to_square=False, side=side),
        prompt=prompt,
        special_tokens=tokens,
        generation=GenerationDefaults(max_new_tokens=64, stop_strings=()),
        tokenizer=fast_tokenizer(tokenizer),
        source_files=(checkpoint.path / "config.json", *(file.path for file in files)),
        reference=reference,
    )


FAMILY = Family(name="toy", model_types=("toy_vlm",), plan=_plan)
