"""Writes the weights of a checkpoint's parts in the layouts of the training code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = [
    "save_bench",
    "save_merged",
    "save_separate",
    "save_shards",
    "stored_state",
    "tower_state",
]

# Today's names of transformers' modules -> those that Factory's checkpoints have: BLIP-2's Q-Former
# is BERT there, and Dinov2 is that of transformers 4. The first come first.
_THEN = {
    "attention.attention.": "attention.self.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}


def stored_state(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    # With duplicates: a tied head is there under its own name too, as in real checkpoints.
    parameters = module.named_parameters(remove_duplicate=False)
    return {_stored(name): value.detach().to(dtype).clone() for name, value in parameters}


def _stored(name: str) -> str:
    """A parameter's name of today as the versions wrote it that Factory trains with."""
    for today, then in _THEN.items():
        name = name.replace(today, then)
    return name


def tower_state(tower: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names below `_vision_tower.`; CLIP and SigLIP had a module `vision_model` then."""
    if tower == "dinov2":
        return state
    if tower == "dinov2-giant":
        return fused_gates(state)
    if tower != "mof":
        return prefixed("vision_model.", state)
    clip = {f"clip.vision_model.{k[5:]}": v for k, v in state.items() if k.startswith("clip.")}
    return clip | {k: v for k, v in state.items() if k.startswith("dinov2.")}


def fused_gates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The SwiGLU feed-forward as Dinov2 had it in transformers 4: gate and values in one matrix."""
    fused = {}
    for name, value in state.items():
        if ".mlp.gate_proj." in name:
            below = state[name.replace("gate_proj", "up_proj")]
            fused[name.replace("gate_proj", "weights_in")] = torch.cat([value, below])
        elif ".mlp.up_proj." not in name:
            fused[name.replace(".mlp.down_proj.", ".mlp.weights_out.")] = value
    return fused


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def save_merged(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    merged = (
        prefixed("vision_tower._vision_tower.", states[0])
        | prefixed("connector._connector.", states[1])
        | prefixed("language_model.", states[2])
    )
    save_shards(folder, merged)


def save_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes two safetensors shards and their index."""
    names = sorted(state)
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half]}
    shards["model-00002-of-00002.safetensors"] = names[half:]
    for file, keys in shards.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_separate(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    parts = {
        "vision_tower": states[0],
        "connector": prefixed("_connector.", states[1]),
        "language_model": states[2],
    }
    for name, state in parts.items():
        (folder / name).mkdir()
        torch.save(state, folder / name / "pytorch_model.bin")
        (folder / name / "config.json").write_text("{}")


def save_bench(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    state = (
        prefixed("model.vision_tower.vision_tower.", states[0])
        | prefixed("model.mm_projector.", states[1])
        | states[2]
    )
    torch.save(state, folder / "pytorch_model.bin")
