"""Low-rank adapters (LoRA) that lie beside a checkpoint's weights, merged while they are read.

Read as peft writes them: adapter_config.json with adapter_model.safetensors or adapter_model.bin;
and, from training runs that save them apart, non_lora_trainables.bin with weights that replace
those of the base model.

Source: https://github.com/huggingface/peft (src/peft/tuners/lora/layer.py, `get_delta_weight`).
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from vlmport.errors import CheckpointError
from vlmport.export.checkpoint import read_json
from vlmport.export.derived_weights import LowRankSum
from vlmport.export.tensor_store import open_weight_file
from vlmport.export.weight_match import collect_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlmport.export.tensor_store import WeightFile
    from vlmport.export.weight_match import PrefixRule

    Entry = tuple[WeightFile, str]

__all__ = ["ADAPTER_CONFIG", "adapter_files", "merge_adapters", "without_wrappers"]

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED_BESIDE = "non_lora_trainables.bin"
# What peft's wrappers add to the names of a model's weights.
_WRAPPERS = re.compile(r"\.base_layer|\.modules_to_save(\.default)?|\.original_module")
_FACTOR = re.compile(r"\.lora_([AB])(\.default)?\.weight$")
# Settings that change what an adapter computes, with the values that leave it plain. Not among
# them: fan_in_fan_out, which peft itself sets to false for the Linear layers that all of the
# models have, and init_lora_weights, since the base weights are saved as it left them.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, [], ()),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_qalora": (False, None),
    "target_parameters": (None, [], ()),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


def adapter_files(folder: Path) -> list[WeightFile]:
    """Opens the adapter's files; an empty list if the folder has no adapter.

    Raises:
        CheckpointError: if there is an adapter_config.json and no weights, or the other way round.
    """
    found = [folder / name for name in _ADAPTERS if (folder / name).is_file()][:1]
    if bool(found) != (folder / ADAPTER_CONFIG).is_file():
        have, lack = (
            (found[0].name, ADAPTER_CONFIG) if found else (ADAPTER_CONFIG, " or ".join(_ADAPTERS))
        )
        msg = f"{folder}: has {have}, but no {lack}; download the missing file"
        raise CheckpointError(msg)
    beside = folder / _TRAINED_BESIDE
    if found and beside.is_file():
        found.append(beside)
    return [open_weight_file(path) for path in found]


def without_wrappers(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors under the names that they have without peft's wrappers."""
    return {_WRAPPERS.sub("", name): entry for name, entry in found.items()}


def merge_adapters(
    folder: Path,
    found: Mapping[str, Entry],
    files: Sequence[WeightFile],
    rules: Sequence[PrefixRule],
) -> dict[str, Entry]:
    """Adds an adapter to the base model's weights.

    Args:
        folder: holds adapter_config.json.
        found: the base model's tensors under parameter names.
        files: as `adapter_files` opens them; none leaves `found` as it is.
        rules: prefix in the whole model -> prefix of the parameter.

    Returns:
        Tensors under the same names; those that the adapter changes are read as their sum.

    Raises:
        CheckpointError: if the adapter is of a form that is not plain LoRA, or changes a weight
            that the model does not have.
    """
    if not files:
        return dict(found)
    config = read_json(folder / ADAPTER_CONFIG)
    _check_plain(folder, config)
    prefixed = [(f"base_model.model.{old}", new) for old, new in rules]
    own = without_wrappers(collect_tensors(files, (*prefixed, ("base_model.model.", ""), *rules)))
    merged = dict(found)
    factors: dict[str, dict[str, Entry]] = {}
    for name, entry in own.items():
        match = _FACTOR.search(name)
        if match is None:
            merged[name] = entry  # biases and modules that were trained in full
        else:
            target = f"{name[: match.start()]}.weight"
            factors.setdefault(target, {})[match.group(1)] = entry
    _check_targets(folder, factors, found)
    for target, pair in factors.items():
        merged[target] = (_sum(merged[target], pair, config), merged[target][1])
    return merged


def _sum(base: Entry, pair: Mapping[str, Entry], config: Mapping[str, Any]) -> LowRankSum:
    file, key = pair["A"]
    rank: int = file.tensors[key].shape[0]
    # As the module is named in the model that was trained, which patterns are written for.
    module = _FACTOR.sub("", key).removeprefix("base_model.model.")
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankSum(base, pair["A"], pair["B"], scale)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the pattern that fits the end of the module's name, as peft looks it up.

    Source: peft/utils/other.py, `get_pattern_key`.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    faults = [
        f"{name} {config[name]!r}"
        for name, plain in _PLAIN.items()
        if name in config and config[name] not in plain
    ]
    if "lora_alpha" not in config:
        faults.append("no lora_alpha")
    if faults:
        msg = (
            f"{folder / ADAPTER_CONFIG}: {', '.join(faults)}; only plain LoRA can be merged; "
            "merge the adapter with peft (merge_and_unload, save_pretrained) and export the result"
        )
        raise CheckpointError(msg)


def _check_targets(
    folder: Path, factors: Mapping[str, Mapping[str, Entry]], found: Mapping[str, Entry]
) -> None:
    faults = []
    for target, pair in factors.items():
        if set(pair) != {"A", "B"}:
            faults.append(f"{target} has lora_{next(iter(pair))} only")
        elif target not in found:
            faults.append(f"{target} is not a weight of the base model")
        else:
            faults += _shape_faults(target, found[target], pair)
    if faults:
        msg = (
            f"{folder}: the adapter does not fit the base model: {'; '.join(faults)}; check that "
            "adapter and weights are of one training run"
        )
        raise CheckpointError(msg)


def _shape_faults(target: str, base: Entry, pair: Mapping[str, Entry]) -> list[str]:
    down, up = (file.tensors[key].shape for file, key in (pair["A"], pair["B"]))
    weight = base[0].tensors[base[1]].shape
    if len(down) == len(up) == 2 and up[1] == down[0] and weight == (up[0], down[1]):
        return []
    return [f"{target} is {weight}, its lora_A {down} and lora_B {up}"]
