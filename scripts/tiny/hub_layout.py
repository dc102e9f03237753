"""Writes a checkpoint folder as the hub's checkpoints of PaliGemma, Idefics2 and Fuyu look.

Those were written by transformers 4.x: weights under its names, `torch_dtype` and `rope_theta` in
config.json, the image processor in preprocessor_config.json. transformers 5.x reads them; what it
writes itself looks otherwise.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

__all__ = [
    "LICENSE", "RESCALE_AND_NORMALIZE", "encoder", "published", "save_checkpoint", "save_weights",
    "tokenizer_settings", "write_json",
]  # fmt: skip

LICENSE = """\
The weights in this folder were trained from scratch by scripts/train_tiny.py, on drawings and
questions that the script generates itself. No model and no data from elsewhere went into them.

Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""
RESCALE_AND_NORMALIZE = {  # the part of preprocessor_config.json in which the families agree
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
}
OF_NO_MODEL = {
    "_name_or_path", "architectures", "chunk_size_feed_forward", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
}  # fmt: skip
Files = Mapping[str, Mapping[str, Any]]  # JSON: numbers, strings, lists and objects


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    renamed: Mapping[str, str],
    tokenizer: Tokenizer,
    files: Files,
) -> None:
    """Writes model.safetensors (float16), tokenizer.json, the JSON files and LICENSE.

    Args:
        folder: made if it does not exist.
        model: a tied weight is written once, under the name that comes first.
        renamed: beginnings of transformers 5.x' weight names and what the hub has instead.
        tokenizer: the tokenizer.
        files: contents of the JSON files by name.
    """
    save_weights(folder, dict(model.named_parameters()), renamed)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        write_json(folder / name, content)
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")


def save_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], renamed: Mapping[str, str]
) -> None:
    """Writes model.safetensors in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, tensor in weights.items():
        begin = next((begin for begin in renamed if name.startswith(begin)), "")
        stored_name = renamed.get(begin, "") + name.removeprefix(begin)
        stored[stored_name] = tensor.detach().to(torch.float16).contiguous()
    path = folder / "model.safetensors"
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner only


def published(model: PreTrainedModel) -> dict[str, Any]:
    """Returns a model's config.json as transformers 4.x spelled it."""
    return {"architectures": [type(model).__name__], **_spelled(model.config.to_dict())}


def _spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spells a config, with the configs inside it, without what only transformers itself uses."""
    spelled: dict[str, Any] = {}
    for name, value in config.items():
        if name in OF_NO_MODEL:
            continue
        if name == "rope_parameters":
            spelled["rope_theta"] = value["rope_theta"]
            spelled["rope_scaling"] = None
            if "partial_rotary_factor" in value:
                spelled["partial_rotary_factor"] = value["partial_rotary_factor"]
        elif name == "dtype":
            spelled["torch_dtype"] = "float16"
        elif isinstance(value, Mapping):
            spelled[name] = _spelled(value)
        else:
            spelled[name] = value
    return spelled


def tokenizer_settings(processor_class: str, padding_side: str) -> dict[str, Any]:
    """Returns tokenizer_config.json but for the special tokens."""
    # The released checkpoints name GemmaTokenizer or LlamaTokenizer; those classes of transformers
    # 5.23 rebuild the tokenizer, and Llama's then differs from tokenizer.json behind a "</s>".
    return {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": padding_side,
        "processor_class": processor_class,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one of a checkpoint's JSON files."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def encoder(tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """Returns a function that encodes text and remembers it: training asks the same again."""
    return functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))
