"""Builds small random Idefics2 checkpoints in the layout of the released ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from support.checkpoints import VOCAB, make_tokenizer, random_weights, save_shards

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CHAT_TEMPLATE", "Idefics2Recipe", "make_idefics2"]

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
# The form of the released instruct and chat checkpoints.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Idefics2Recipe:
    """What a checkpoint is made of; sizes that are not given are those of the small default."""

    splits: bool = False
    chat: bool = True
    tied: bool = False
    pickled: bool = False
    dtype: torch.dtype = torch.float32
    latents: int = 8
    shortest: int = 42
    longest: int = 98
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    perceiver: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def make_idefics2(folder: Path, recipe: Idefics2Recipe) -> Path:
    """Writes a checkpoint whose greedy tokens vary: config, weights, tokenizer, processor."""
    folder.mkdir(parents=True)
    make_tokenizer(folder, (FAKE, IMAGE, END))
    values = _config(recipe)
    config = transformers.Idefics2Config(**json.loads(json.dumps(values)))
    torch.manual_seed(recipe.seed)
    model: Any = random_weights(transformers.Idefics2ForConditionalGeneration(config))
    # As on the hub: few keys, the rest are the defaults of the config classes.
    (folder / "config.json").write_text(json.dumps({"model_type": "idefics2", **values}))
    state = {name: value.detach().to(recipe.dtype) for name, value in model.state_dict().items()}
    if recipe.tied:
        state.pop("lm_head.weight")
    if recipe.pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_shards(folder, {name: value.clone() for name, value in state.items()})
    _save_processor(folder, recipe)
    return folder


def _config(recipe: Idefics2Recipe) -> dict[str, Any]:
    text = {
        "model_type": "mistral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "head_dim": 24,
    }
    vision = {
        "model_type": "idefics2",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 64,
        "image_size": 98,
        "patch_size": 14,
    }
    perceiver = {
        "model_type": "idefics2",
        "hidden_size": (text | recipe.text)["hidden_size"],
        "rms_norm_eps": 1e-5,
        "resampler_n_latents": recipe.latents,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 12,
        "num_key_value_heads": 2,
    }
    return {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "image_token_id": 4,
        "text_config": text | recipe.text,
        "vision_config": vision | recipe.vision,
        "perceiver_config": perceiver | recipe.perceiver,
        "tie_word_embeddings": recipe.tied,
        "torch_dtype": str(recipe.dtype).removeprefix("torch."),
    }


def _save_processor(folder: Path, recipe: Idefics2Recipe) -> None:
    processor: Any = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": recipe.shortest, "longest_edge": recipe.longest},
        do_image_splitting=recipe.splits,
    )
    processor.save_pretrained(folder)
    settings = {"image_seq_len": recipe.latents, "processor_class": "Idefics2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    ends = [2, 5] if recipe.chat else 2
    generation = {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if recipe.chat:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
