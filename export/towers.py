"""Configs of vision towers, from a checkpoint's own words or by the name of a released tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers import CLIPVisionConfig, SiglipVisionConfig

from vlmport.errors import CheckpointError, close_matches
from vlmport.export.checkpoint import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PretrainedConfig

__all__ = ["known_tower", "tower_config"]

_CONFIGS: dict[str, Any] = {  # the classes share no useful static type
    "clip_vision_model": CLIPVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}
# Released towers that older checkpoints name without carrying their config.
_RELEASED: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
    "google/siglip-base-patch16-224": {
        "model_type": "siglip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 224,
    },
}


def tower_config(checkpoint: Path, section: Mapping[str, Any]) -> PretrainedConfig:
    """The config of a tower from a vision_config section.

    Raises:
        CheckpointError: if its model_type is not one of the towers.
    """
    # CLIPConfig and SiglipConfig nest the tower's section under the same name.
    model_type = str(section.get("model_type", ""))
    config_class = _CONFIGS.get(model_type)
    if config_class is None:
        msg = (
            f"{checkpoint}/config.json: vision_config has model_type {model_type!r}; "
            f"{close_matches(model_type, _CONFIGS)}"
        )
        raise CheckpointError(msg)
    fields = {name: value for name, value in section.items() if name != "model_type"}
    return cast("PretrainedConfig", config_class(**fields))


def known_tower(checkpoint: Path, name: str) -> PretrainedConfig:
    """The config of a tower that is only named.

    Args:
        checkpoint: a folder of that name inside it may hold the tower's config.json.
        name: as in the checkpoint's config.

    Raises:
        CheckpointError: if the name is neither a folder of the checkpoint nor a released tower.
    """
    local = checkpoint / name
    inside = local.resolve().is_relative_to(checkpoint.resolve())
    if inside and (local / "config.json").is_file():
        content = read_json(local / "config.json")
        return tower_config(checkpoint, content.get("vision_config", content))
    if name not in _RELEASED:
        msg = (
            f"{checkpoint}/config.json: the vision tower {name!r} is not in the checkpoint; "
            f"{close_matches(name, _RELEASED)}; or put its config.json into the folder {name} of "
            "the checkpoint"
        )
        raise CheckpointError(msg)
    return tower_config(checkpoint, _RELEASED[name])
