"""Builds small random Idefics2 checkpoints with the files that released ones have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from support.checkpoints import VOCAB, make_tokenizer, save_shards

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CHAT_TEMPLATE", "Idefics2Recipe", "make_idefics2"]

_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
AROUND, IMAGE, END = 3, 4, 5
# As the instruction-tuned checkpoints have it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Idefics2Recipe:
    """What a checkpoint is made of."""

    splits: bool = False
    chat: bool = True
    shortest_edge: int = 28
    longest_edge: int = 70
    image_size: int = 70
    patch_size: int = 14
    tower_hidden: int = 32
    tower_layers: int = 2
    tower_heads: int = 2
    hidden_size: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    intermediate: int = 64
    sliding_window: int | None = 4096
    latents: int = 6
    depth: int = 2
    resampler_heads: int = 4
    resampler_kv_heads: int = 2
    resampler_head_dim: int = 8
    tied: bool = False
    layout: str = "shards"
    dtype: torch.dtype = torch.float32
    bad_words: bool = True
    # As the released base model: no token for the end of a turn, the fewest keys in config.json.
    is_base_release: bool = False
    seed: int = 0


def make_idefics2(folder: Path, recipe: Idefics2Recipe) -> Path:
    """Writes a checkpoint with random weights that make greedy tokens vary."""
    folder.mkdir(parents=True)
    torch.manual_seed(recipe.seed)
    config = _config(recipe)
    model: Any = transformers.Idefics2ForConditionalGeneration(
        transformers.Idefics2Config(**config)
    )
    _randomize(model)
    make_tokenizer(folder, _TOKENS[: 2 if recipe.is_base_release else 3])
    _write_settings(folder, recipe, config)
    state = {name: value.to(recipe.dtype).clone() for name, value in model.state_dict().items()}
    if recipe.tied:
        del state["lm_head.weight"]
    if recipe.layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif recipe.layout == "single":
        save_file(state, folder / "model.safetensors")
    else:
        save_shards(folder, state)
    return folder


def _config(recipe: Idefics2Recipe) -> dict[str, Any]:
    """config.json with the keys that released checkpoints have, and no others."""
    text: dict[str, Any] = {
        "model_type": "mistral",
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "num_hidden_layers": recipe.layers,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "pad_token_id": 0,
        "vocab_size": VOCAB,
        "sliding_window": recipe.sliding_window,
    }
    if recipe.head_dim is not None:
        text["head_dim"] = recipe.head_dim
    perceiver: dict[str, Any] = {
        "hidden_size": recipe.hidden_size,
        "rms_norm_eps": 1e-05,
        "resampler_n_latents": recipe.latents,
        "resampler_depth": recipe.depth,
        "resampler_n_heads": recipe.resampler_heads,
        "resampler_head_dim": recipe.resampler_head_dim,
        "num_key_value_heads": recipe.resampler_kv_heads,
    }
    if recipe.is_base_release:
        del text["sliding_window"]
        text["max_position_embeddings"] = 32768
        perceiver = {}
    return {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "model_type": "idefics2",
        "image_token_id": IMAGE,
        "tie_word_embeddings": recipe.tied,
        "torch_dtype": "float32",
        "perceiver_config": {"model_type": "idefics2", **perceiver},
        "text_config": text,
        "vision_config": {
            "model_type": "idefics2",
            "hidden_size": recipe.tower_hidden,
            "image_size": recipe.image_size,
            "intermediate_size": 48,
            "num_attention_heads": recipe.tower_heads,
            "num_hidden_layers": recipe.tower_layers,
            "patch_size": recipe.patch_size,
        },
    }


def _write_settings(folder: Path, recipe: Idefics2Recipe, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    preprocessor = {
        "do_convert_rgb": True,
        "do_image_splitting": recipe.splits,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Idefics2Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": recipe.longest_edge, "shortest_edge": recipe.shortest_edge},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    latents = 64 if recipe.is_base_release else recipe.latents
    processor = {"image_seq_len": latents, "processor_class": "Idefics2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    ends = 2 if recipe.is_base_release else [2, END]
    generation: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0}
    if recipe.bad_words:
        generation["bad_words_ids"] = [[AROUND], [IMAGE]]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if recipe.chat:
        template = json.dumps({"chat_template": CHAT_TEMPLATE})
        (folder / "chat_template.json").write_text(template)


def _randomize(model: Any) -> None:
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
            elif "embed_tokens" in name or "position_embedding" in name or "latents" in name:
                parameter.normal_(0, 0.5)
            else:
                fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 400
                parameter.normal_(0, 1.4 * fan_in**-0.5)
    model.eval()
