"""Builds small random PaliGemma checkpoints in the layouts in which they are released."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from support.checkpoints import save_shards
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PaliGemmaRecipe", "location_id", "make_paligemma", "make_paligemma_tokenizer"]

_TEXT = (
    "detect cat ; dog segment the red circle caption en answer en What is in the picture? "
    "Describe the picture closely before you answer. Name every shape that you can see."
)
_WORDS = 400
# Rows beyond the tokens, as the released checkpoints have 64 of them.
_SPARE_ROWS = 7
VOCAB = _WORDS + 1024 + 128 + 1


@dataclass(frozen=True, slots=True)
class PaliGemmaRecipe:
    """What a checkpoint is made of."""

    language_model: str = "gemma"
    image_size: int = 56
    patch_size: int = 14
    tower_hidden: int = 32
    tower_layers: int = 2
    tower_heads: int = 2
    hidden_size: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 16
    intermediate: int = 64
    sliding_window: int = 4096
    query_pre_attn_scalar: int = 24
    attn_softcap: float | None = 5.0
    final_softcap: float | None = 3.0
    attention_bias: bool = False
    tied: bool = True
    layout: str = "hub"
    dtype: torch.dtype = torch.float32
    chat_template: str | None = None
    seed: int = 0
    text_settings: dict[str, Any] = field(default_factory=dict)


def make_paligemma(folder: Path, recipe: PaliGemmaRecipe) -> Path:
    """Writes a checkpoint with random weights that make greedy tokens vary.

    Layouts: "hub" has the key names of transformers 4.x, as all released checkpoints, in two
    shards; "bin" the same as one pickled state dict; "nested" the names of transformers 5's
    modules; "saved" is what save_pretrained of this transformers writes.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(recipe.seed)
    config = _config(recipe)
    model: Any = transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(**config)
    )
    _randomize(model, recipe)
    make_paligemma_tokenizer(folder, recipe.chat_template)
    (folder / "preprocessor_config.json").write_text(json.dumps(_image_processor(recipe)))
    if recipe.layout == "saved":
        model.to(recipe.dtype).save_pretrained(folder)
        return folder
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"pad_token_id": 0}))
    state = {name: value.to(recipe.dtype) for name, value in model.state_dict().items()}
    if recipe.tied:
        del state["lm_head.weight"]
    if recipe.layout == "nested":
        save_file({name: value.clone() for name, value in state.items()}, _single(folder))
        return folder
    state = {_released_name(name): value.clone() for name, value in state.items()}
    if recipe.layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_shards(folder, state)
    return folder


def make_paligemma_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """Gemma's form: no space in front, byte fallback, <loc> and <seg> as ordinary added tokens."""
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    wrapped = transformers.GemmaTokenizer(
        tokenizer_object=tokenizer, vocab=_vocabulary(tokenizer), merges=_merges(tokenizer)
    )
    wrapped.add_tokens([f"<loc{index:04}>" for index in range(1024)])
    wrapped.add_tokens([f"<seg{index:03}>" for index in range(128)])
    image = transformers.AddedToken("<image>", normalized=False, special=True)
    wrapped.add_special_tokens({"additional_special_tokens": [image]})
    assert wrapped.convert_tokens_to_ids("<image>") == VOCAB - 1
    if chat_template is not None:
        wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)


def location_id(location: int) -> int:
    """Token id of <locNNNN>."""
    return _WORDS + location


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = sorted({*_TEXT.replace(" ", "▁"), "\n"})
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS,
        special_tokens=[*special, *byte_tokens],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 2, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    vocabulary = content["model"]["vocab"]
    for index in range(len(vocabulary), _WORDS):
        vocabulary[f"<unused{index}>"] = index
    return json.dumps(content)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads(tokenizer.to_str())["model"]["vocab"]
    return vocabulary


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _config(recipe: PaliGemmaRecipe) -> dict[str, Any]:
    """config.json with the keys that released checkpoints have, and no others."""
    text: dict[str, Any] = {
        "model_type": recipe.language_model,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "num_hidden_layers": recipe.layers,
        "head_dim": recipe.head_dim,
        "vocab_size": VOCAB + _SPARE_ROWS,
        "attention_bias": recipe.attention_bias,
        "torch_dtype": "float32",
    }
    if recipe.language_model == "gemma2":
        text |= {
            "sliding_window": recipe.sliding_window,
            "query_pre_attn_scalar": recipe.query_pre_attn_scalar,
            "attn_logit_softcapping": recipe.attn_softcap,
            "final_logit_softcapping": recipe.final_softcap,
            "hidden_activation": "gelu_pytorch_tanh",
        }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": recipe.tower_hidden,
        "intermediate_size": 48,
        "num_attention_heads": recipe.tower_heads,
        "num_hidden_layers": recipe.tower_layers,
        "image_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "projection_dim": recipe.hidden_size,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": recipe.hidden_size,
        "projection_dim": recipe.hidden_size,
        "image_token_index": VOCAB - 1,
        "tie_word_embeddings": recipe.tied,
        "text_config": text | recipe.text_settings,
        "vision_config": vision,
    }


def _image_processor(recipe: PaliGemmaRecipe) -> dict[str, Any]:
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": (recipe.image_size // recipe.patch_size) ** 2,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": recipe.image_size, "width": recipe.image_size},
    }


def _randomize(model: Any, recipe: PaliGemmaRecipe) -> None:
    """Scales that make greedy tokens vary: tied embeddings of large ones repeat the last token."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name and "vision" not in name:
                parameter.uniform_(-0.3, 0.3)  # Gemma multiplies by 1 + weight
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.35 * recipe.hidden_size**-0.5)
            elif "position_embedding" in name:
                parameter.normal_(0, 0.5)
            else:
                fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 400
                parameter.normal_(0, 1.6 * fan_in**-0.5)
    model.eval()


def _released_name(name: str) -> str:
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    short = name.removeprefix("model.")
    short = short.replace("language_model.", "language_model.model.", 1)
    return short.replace("vision_tower.", "vision_tower.vision_model.", 1)


def _single(folder: Path) -> Path:
    return folder / "model.safetensors"
