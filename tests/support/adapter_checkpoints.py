"""LoRA runs in the layout of Factory, made by peft itself."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.checkpoint_layouts import save_shards
from support.checkpoints import Recipe, connector_module, make_checkpoint
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["make_adapter_run"]


def make_adapter_run(
    folder: Path,
    recipe: Recipe,
    parts: tuple[str, ...] = ("language_model",),
    *,
    safetensors: bool = True,
    **settings: Any,
) -> tuple[Path, Path]:
    """Writes a LoRA run, and the checkpoint that peft merges it to.

    Args:
        folder: to hold both.
        recipe: of the base model: the merged layout, a SigLIP or CLIP tower.
        parts: those whose Linear layers get adapters.
        safetensors: whether the adapter's weights are; else a pickled state dict.
        settings: of peft's LoraConfig.

    Returns:
        (the run: base weights in a folder for each part, and the adapter; the merged checkpoint).
    """
    merged = make_checkpoint(folder / "merged", recipe)
    whole = _whole_model(merged, recipe)
    targets = [
        name
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(parts) and "head" not in name
    ]
    model: Any = get_peft_model(whole, LoraConfig(target_modules=targets, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # peft begins with lora_B = 0, which would change nothing
                parameter.normal_(0, 0.1)
            elif parameter.requires_grad:
                parameter.add_(0.01)  # biases that are trained beside the adapter
    run = _save_run(folder / "run", merged, model, safetensors=safetensors)
    state = dict(model.merge_and_unload().named_parameters(remove_duplicate=False))
    for shard in merged.glob("model*"):
        shard.unlink()
    save_shards(merged, {name: value.detach().clone() for name, value in state.items()})
    return run, merged


class _Wrapper(nn.Module):
    """Holds a part under an underscored name, as Factory's classes do."""

    def __init__(self, name: str, part: nn.Module) -> None:
        super().__init__()
        setattr(self, name, part)


def _whole_model(checkpoint: Path, recipe: Recipe) -> nn.Module:
    """The base model under the names of the merged layout, in the stored type."""
    config = json.loads((checkpoint / "config.json").read_text())
    text, vision = (_config(config[name]) for name in ("text_config", "vision_config"))
    tower = _Wrapper("vision_model", transformers.AutoModel.from_config(vision))
    whole = nn.Module()
    whole.language_model = transformers.AutoModelForCausalLM.from_config(text)
    whole.vision_tower = _Wrapper("_vision_tower", tower)
    connector = connector_module(recipe.connector, vision.hidden_size, text.hidden_size)
    whole.connector = _Wrapper("_connector", connector)
    state: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("*.safetensors"):
        state |= load_file(shard)
    missing, unexpected = whole.to(recipe.dtype).load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith(("position_ids", "lm_head.weight")) for name in missing)
    return whole


def _config(section: dict[str, Any]) -> Any:
    fields = {name: value for name, value in section.items() if name != "model_type"}
    return transformers.AutoConfig.for_model(section["model_type"], **fields)


def _save_run(folder: Path, merged: Path, model: Any, *, safetensors: bool) -> Path:
    """As training_recipe/lora_recipe.py of Factory: everything but the adapter, and the adapter."""
    folder.mkdir()
    for path in merged.iterdir():
        if path.is_file() and not path.name.startswith("model"):
            shutil.copy(path, folder)
    whole = model.base_model.model
    parts = {
        "language_model": whole.language_model,
        "vision_tower": whole.vision_tower._vision_tower,
        "connector": whole.connector,
    }
    for name, part in parts.items():
        (folder / name).mkdir()
        state = {
            key: value.detach() for key, value in part.named_parameters() if "lora_" not in key
        }
        torch.save(state, folder / name / "pytorch_model.bin")
    model.save_pretrained(folder)
    if not safetensors:
        saved = folder / "adapter_model.safetensors"
        torch.save(load_file(saved), folder / "adapter_model.bin")
        saved.unlink()
    return folder
