"""Builds small random Fuyu checkpoints with real tokenizer and processor files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from support.checkpoints import random_weights, save_shards
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BOS", "IMAGE_TOKEN_ID", "FuyuRecipe", "make_fuyu_checkpoint", "make_fuyu_tokenizer"]

BOS, _EOS = 1, 2
IMAGE_TOKEN_ID = 3
_SPECIAL = ("<unk>", "<s>", "</s>")
_PIECES = ("|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|")
_TEXT = (
    "▁What ▁is ▁in ▁the ▁picture ▁Generate ▁a ▁coco - style ▁caption . ▁box ▁point , ? ! ▁an "
    "▁two ▁red ▁blue ▁square ▁circle ▁Look ▁at ▁this ▁and ▁compare s ing < > / box point </ ox"
)


@dataclass(frozen=True, slots=True)
class FuyuRecipe:
    """What a checkpoint is made of.

    Attributes:
        layout: "hub" for the key names of transformers 4.x, "transformers" for those of 5.x.
        is_flat: whether config.json holds the language model's settings at its top, as the
            released checkpoint does.
    """

    hidden_size: int = 96
    heads: int = 4
    layers: int = 2
    intermediate_size: int = 160
    patch: int = 6
    max_height: int = 60
    max_width: int = 96
    rotary: float = 0.5
    theta: float = 25000.0
    qk_layernorm: bool = True
    numbers: int = 700
    max_length: int = 1024
    layout: str = "hub"
    is_flat: bool = False
    tied: bool = False
    file: str = "shards"
    dtype: torch.dtype = torch.float32
    seed: int = 0


def make_fuyu_tokenizer(folder: Path, numbers: int) -> int:
    """A Unigram tokenizer with a leading "▁", byte tokens and number tokens; returns its size."""
    names = [*_SPECIAL, *_PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [str(number) for number in range(numbers)]
    letters = {chr(code) for code in range(33, 127)} | {"▁", "\n"} | set(_TEXT.split())
    names += sorted(letters - set(names))
    scores = [
        (name, 0.0 if index < 5 else -1.0 - 0.001 * index) for index, name in enumerate(names)
    ]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    return len(names)


def make_fuyu_checkpoint(folder: Path, recipe: FuyuRecipe) -> Path:
    """Writes a checkpoint with random weights that make greedy tokens vary."""
    folder.mkdir(parents=True)
    torch.manual_seed(recipe.seed)
    vocab_size = make_fuyu_tokenizer(folder, recipe.numbers)
    size = {"height": recipe.max_height, "width": recipe.max_width}
    patch: Any = {"height": recipe.patch, "width": recipe.patch}
    processor: Any = FuyuImageProcessorPil(size=size, patch_size=patch)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    transformers.FuyuProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(
        folder
    )
    config = _config(recipe, vocab_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = random_weights(
        transformers.FuyuForCausalLM(transformers.FuyuConfig.from_pretrained(folder))
    )
    state = {name: value.detach().to(recipe.dtype) for name, value in model.state_dict().items()}
    if recipe.tied:
        state.pop("lm_head.weight")
    if recipe.layout == "hub":
        state = {_hub_name(name): value for name, value in state.items()}
    if recipe.file == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_shards(folder, state)
    return folder


def _config(recipe: FuyuRecipe, vocab_size: int) -> dict[str, Any]:
    text: dict[str, Any] = {
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": recipe.max_length,
        "rope_theta": recipe.theta,
        "qk_layernorm": recipe.qk_layernorm,
    }
    config = {
        "model_type": "fuyu",
        "architectures": ["FuyuForCausalLM"],
        "patch_size": recipe.patch,
        "num_channels": 3,
        "image_token_id": IMAGE_TOKEN_ID,
        "tie_word_embeddings": recipe.tied,
        "bos_token_id": BOS,
        "eos_token_id": _EOS,
    }
    if recipe.is_flat:
        return config | text
    text["partial_rotary_factor"] = recipe.rotary
    return config | {"text_config": {"model_type": "persimmon", **text}}


def _hub_name(name: str) -> str:
    """The key names of transformers 4.x, which the released checkpoint has."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)
