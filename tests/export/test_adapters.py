"""Merged adapters are what peft's merge_and_unload makes of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_checkpoints import make_adapter_run
from support.checkpoints import Recipe

from vlmport.errors import CheckpointError
from vlmport.export.derived_weights import LowRankSum
from vlmport.export.family import plan_checkpoint
from vlmport.export.tensor_store import StoredTensor

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ALL_PARTS = ("language_model", "vision_tower", "connector")
EPSILON = float(np.finfo(np.float32).eps)
LAST_Q = "language_model.model.layers.1.self_attn.q_proj"


def check_merged(run: Path, merged: Path, dtype: torch.dtype = torch.float32) -> int:
    """Compares all tensors; returns how many the adapter changes."""
    found, expected = (plan_checkpoint(path)[1].store for path in (run, merged))
    assert found.entries.keys() == expected.entries.keys()
    changed = 0
    for name, (file, _) in found.entries.items():
        ours = found.read(name).astype(np.float64)
        theirs = expected.read(name).astype(np.float64)
        # Both round a sum of the weight and a product of rank 4 or 8; the stored type rounds
        # peft's once more.
        unit = EPSILON if dtype == torch.float32 else float(torch.finfo(dtype).eps)
        is_merged = isinstance(file, LowRankSum)
        limit = 2 * unit * (1 + np.abs(theirs)) if is_merged else 0.0
        assert (np.abs(ours - theirs) <= limit).all(), name
        changed += is_merged
    return changed


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {LAST_Q: 8}, "alpha_pattern": {LAST_Q: 32}},
        {"r": 4, "lora_alpha": 8, "bias": "all"},
        {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True},
    ],
    ids=["plain", "rslora", "patterns", "biases", "fan_in_fan_out"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_equal_to_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe("phi", "clip", "mlp2x_gelu")
    run, merged = make_adapter_run(tmp_path, recipe, ALL_PARTS, **settings)
    assert check_merged(run, merged) == 2 * 6 + 3 * 6 + 2


def test_equal_to_peft_for_pickled_adapters_of_a_tied_model(tmp_path: Path) -> None:
    recipe = Recipe("llama", "siglip", "linear", tied=True)
    run, merged = make_adapter_run(tmp_path, recipe, safetensors=False, r=8, lora_alpha=16)
    assert (run / "adapter_model.bin").is_file()
    assert check_merged(run, merged) == 2 * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_is_rounded_less_than_by_peft(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    recipe = Recipe("qwen2", "siglip", "linear", dtype=dtype)
    run, merged = make_adapter_run(tmp_path, recipe, r=4, lora_alpha=8)
    assert check_merged(run, merged, dtype) == 2 * 7
    assert plan_checkpoint(run)[1].layout == "factory-separate, LoRA"


def test_weights_that_were_saved_beside_replace_those_of_the_base(tmp_path: Path) -> None:
    run, _ = make_adapter_run(tmp_path, Recipe(connector="linear"), r=4, lora_alpha=8)
    trained = torch.full((96,), 3.0)
    beside = {"base_model.model.connector._connector.bias": trained}
    torch.save(beside, run / "non_lora_trainables.bin")
    store = plan_checkpoint(run)[1].store
    np.testing.assert_array_equal(store.read("connector.bias"), trained.numpy())


def test_blocks_of_rows_are_the_rows_of_the_whole(tmp_path: Path) -> None:
    run, _ = make_adapter_run(tmp_path, Recipe(), r=4, lora_alpha=8)
    store = plan_checkpoint(run)[1].store
    name = f"{LAST_Q}.weight"
    blocks = [store.read_rows(name, start, start + 32) for start in (0, 32, 64)]
    np.testing.assert_allclose(np.concatenate(blocks), store.read(name), rtol=0, atol=EPSILON)


class CountingFile:
    """A file of one matrix that notes which rows are read."""

    def __init__(self, path: Path, array: NDArray[np.float32]) -> None:
        self.path = path
        self.tensors = {"": StoredTensor("", array.dtype, array.shape)}
        self.read: list[tuple[int, int]] = []
        self._array = array

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        del name
        self.read.append((start, stop))
        return self._array[start:stop]


def test_only_the_rows_of_a_block_are_read(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = ((1000, 50), (4, 50), (1000, 4))
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    weight, down, up = (CountingFile(tmp_path, array) for array in arrays)
    merged = LowRankSum((weight, ""), (down, ""), (up, ""), 0.5)
    found = merged.read_rows("", 10, 20)
    exact = arrays[0].astype(np.float64) + 0.5 * arrays[2].astype(np.float64) @ arrays[1]
    np.testing.assert_allclose(found, exact[10:20], rtol=0, atol=8 * EPSILON)
    assert weight.read == up.read == [(10, 20)]
    assert down.read == [(0, 4)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_adapter_run(tmp_path, Recipe(), r=4, lora_alpha=8)[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_dora": True}, "use_dora True; only plain LoRA can be merged; merge .* with peft"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_other_forms_are_refused(setting: dict[str, Any], message: str, run: Path) -> None:
    path = run / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(CheckpointError, match=message):
        plan_checkpoint(run)


def test_adapter_without_its_other_half_is_named(run: Path) -> None:
    (run / "adapter_model.safetensors").rename(run / "elsewhere")
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json, but no adapter_model"):
        plan_checkpoint(run)
    (run / "elsewhere").rename(run / "adapter_model.safetensors")
    (run / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has adapter_model\.safetensors, but no adapter_c"):
        plan_checkpoint(run)


def test_adapter_of_another_model_is_refused(run: Path) -> None:
    path = run / "adapter_model.safetensors"
    state = load_file(path)
    key = f"base_model.model.{LAST_Q}.lora_A.weight"
    state[key] = torch.zeros(4, 7)
    state[key.replace("layers.1", "layers.9")] = torch.zeros(4, 96)
    state[key.replace("layers.1", "layers.9").replace("lora_A", "lora_B")] = torch.zeros(96, 4)
    del state[key.replace("lora_A", "lora_B").replace("q_proj", "k_proj")]
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint(run)
    message = str(caught.value)
    assert f"{LAST_Q}.weight is (96, 96), its lora_A (4, 7) and lora_B (96, 4)" in message
    assert "layers.9.self_attn.q_proj.weight is not a weight of the base model" in message
    assert "layers.1.self_attn.k_proj.weight has lora_A only" in message
