"""Configs of vision towers, from a checkpoint's own words or by the name of a released tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

from vlmport.errors import CheckpointError, close_matches
from vlmport.export.checkpoint import read_json
from vlmport.export.derived_weights import split_fused_gates

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PretrainedConfig

    from vlmport.export.tensor_store import WeightFile

__all__ = ["current_names", "known_tower", "paired_tower", "seen_side", "tower_config"]

_CONFIGS: dict[str, Any] = {  # the classes share no useful static type
    "clip_vision_model": CLIPVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
    "dinov2": Dinov2Config,
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
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
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
    # All four have patches of 14 pixels and a position embedding for images of 518.
    **{
        f"facebook/dinov2-{name}": {
            "model_type": "dinov2",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "patch_size": 14,
            "image_size": 518,
            "use_swiglu_ffn": name == "giant",
        }
        for name, hidden, layers, heads in (
            ("small", 384, 12, 6),
            ("base", 768, 12, 12),
            ("large", 1024, 24, 16),
            ("giant", 1536, 40, 24),
        )
    },
}
# Names inside a tower that changed: Dinov2Model of transformers 4.x -> 5.x.
_RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".mlp.weights_out.": ".mlp.down_proj.",
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


def paired_tower(checkpoint: Path, tower: PretrainedConfig, name: str) -> PretrainedConfig:
    """The config of a Dinov2 tower that sees what a CLIP tower sees and gives as many features.

    Args:
        checkpoint: as in `known_tower`.
        tower: the CLIP tower's config.
        name: of the Dinov2 tower, as in the checkpoint's config.

    Raises:
        CheckpointError: if there is no such tower, or the two do not fit each other.
    """
    faults = []
    if tower.model_type != "clip_vision_model":
        faults.append(f"the first is {tower.model_type!r}, expected CLIP")
    if not name:
        faults.append("no vision_model_name_or_path2, expected the name of a Dinov2 tower")
    second = known_tower(checkpoint, name) if name else tower
    if name and second.model_type != "dinov2":
        faults.append(f"the second is {second.model_type!r}, expected Dinov2")
    shapes = [(one.hidden_size, tower.image_size // one.patch_size) for one in (tower, second)]
    if shapes[0] != shapes[1]:
        faults.append(f"(feature length, patches a side) are {shapes}, expected equal ones")
    if faults:
        msg = f"{checkpoint}/config.json: a mixture of two towers: {'; '.join(faults)}"
        raise CheckpointError(msg)
    return second


def seen_side(tower: PretrainedConfig, processed: tuple[int, int] | None) -> int:
    """Pixels of a side that a tower sees.

    Args:
        tower: its config. Dinov2 resamples its position embedding to what it is given; the others
            take their own size alone.
        processed: (height, width) of what the image processor makes; None if pictures differ.
    """
    if tower.model_type == "dinov2" and processed is not None and processed[0] == processed[1]:
        return processed[0]
    return int(tower.image_size)


def current_names(
    found: Mapping[str, tuple[WeightFile, str]], prefixes: tuple[str, ...]
) -> dict[str, tuple[WeightFile, str]]:
    """Tensors with those of towers under the names that transformers 5 gives them.

    Args:
        found: tensors under parameter names.
        prefixes: what the names of Dinov2 towers begin with.

    Source: transformers/conversion_mapping.py, "Dinov2Model".
    """
    entries: dict[str, tuple[WeightFile, str]] = {}
    for name, entry in found.items():
        if name.startswith(prefixes):
            for old, new in _RENAMED.items():
                name = name.replace(old, new)
        entries[name] = entry
    return split_fused_gates(entries)
