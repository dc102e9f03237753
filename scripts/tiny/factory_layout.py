"""Writes the files around TinyLLaVA_Factory's weights: configs, tokenizer files, LICENSE.

The configs are spelled as Factory and transformers 4.x spelled them, since that is what published
checkpoints hold. Factory chooses classes by substrings of the names: "tinyllama" and "siglip".

Source: https://github.com/TinyLLaVA/TinyLLaVA_Factory (commit 53f12c7): configuration_tinyllava.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, SiglipVisionConfig

from tiny.hub_layout import LICENSE, write_json
from tiny.tokenizer import BOS, EOS, UNK

__all__ = ["FEATURE_LAYER", "write_factory_files"]

FEATURE_LAYER = -2  # index over [embeddings, layer 1, ..., layer N]: the input of the last block
LLM_NAME = "vlmport/tinyllama-2m-drawings"
VISION_NAME = "vlmport/siglip-patch8-64-drawings"


def write_factory_files(folder: Path, text: LlamaConfig, vision: SiglipVisionConfig) -> None:
    """Writes everything but model.safetensors and tokenizer.json.

    Args:
        folder: an existing folder.
        text: the decoder's config.
        vision: the tower's config.
    """
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": UNK, "unk_token": UNK}
    write_json(folder / "config.json", _factory_config(text, vision))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(special))
    write_json(folder / "special_tokens_map.json", special)
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")


def _factory_config(text: LlamaConfig, vision: SiglipVisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "cache_dir": None,
        "connector_type": "mlp2x_gelu",
        "hidden_size": text.hidden_size,
        "ignore_index": -100,
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "llm_model_name_or_path": LLM_NAME,
        "model_type": "tinyllava",
        "num_queries": 128,
        "num_resampler_layers": 3,
        "pad_token": UNK,
        "pad_token_id": text.pad_token_id,
        "resampler_hidden_size": 768,
        "text_config": _llama_config(text),
        "tokenizer_model_max_length": 2048,
        "tokenizer_name_or_path": LLM_NAME,
        "tokenizer_padding_side": "right",
        "tokenizer_use_fast": False,
        "torch_dtype": "float16",
        "transformers_version": "4.40.1",
        "tune_type_connector": "full",
        "tune_type_llm": "full",
        "tune_type_vision_tower": "full",
        "tune_vision_tower_from_layer": 0,
        "use_cache": False,
        "vision_config": _siglip_config(vision),
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "patch",
        "vision_hidden_size": vision.hidden_size,
        "vision_model_name_or_path": VISION_NAME,
        "vision_model_name_or_path2": "",
        "vocab_size": text.vocab_size,
    }


def _llama_config(text: LlamaConfig) -> dict[str, Any]:
    """Spells the config as transformers 4.x did: rope_theta and torch_dtype at the top."""
    fields = {
        "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim",
        "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
        "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "pad_token_id", "pretraining_tp",
        "rms_norm_eps", "tie_word_embeddings", "use_cache", "vocab_size",
    }  # fmt: skip
    config = {name: value for name, value in text.to_dict().items() if name in fields}
    return config | {
        "_name_or_path": LLM_NAME,
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
    }


def _siglip_config(vision: SiglipVisionConfig) -> dict[str, Any]:
    fields = {
        "attention_dropout", "hidden_act", "hidden_size", "image_size", "intermediate_size",
        "layer_norm_eps", "model_type", "num_attention_heads", "num_channels",
        "num_hidden_layers", "patch_size",
    }  # fmt: skip
    config = {name: value for name, value in vision.to_dict().items() if name in fields}
    return config | {"model_name_or_path": VISION_NAME, "model_name_or_path2": ""}


def _tokenizer_config(special: dict[str, str]) -> dict[str, Any]:
    # Factory names LlamaTokenizer; that class of transformers 5.23 rebuilds the tokenizer and
    # encodes what follows a "</s>" differently from tokenizer.json.
    return special | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
