from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import Recipe, make_checkpoint

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.errors import CheckpointError, ExportError, VlmportError
from vlmport.export.family import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", Recipe())


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_folder_and_file_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        plan_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="a file; expected the folder"):
        plan_checkpoint(tmp_path / "file")


def test_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        plan_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        plan_checkpoint(tmp_path)


def test_unknown_model_type_lists_the_nearest(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="tinylava")
    with pytest.raises(CheckpointError, match="'tinylava'; did you mean tinyllava"):
        plan_checkpoint(checkpoint)


def test_missing_extra_and_misshapen_weights_are_listed_at_once(checkpoint: Path) -> None:
    state = load_file(checkpoint / SHARD)
    names = sorted(name for name in state if "language_model" in name or "vision" in name)
    state["language_model.model.extra.weight"] = torch.zeros(3)
    missing, misshapen = names[0], names[1]
    del state[missing]
    state[misshapen] = torch.zeros(2, 2, 2)
    save_file(state, checkpoint / SHARD)
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint(checkpoint)
    message = str(caught.value)
    assert "missing weights (1)" in message
    assert "language_model.model.extra.weight" in message
    assert "weights of the wrong shape (1)" in message
    assert "(2, 2, 2), expected" in message


def test_truncated_and_missing_shards_are_named(checkpoint: Path) -> None:
    path = checkpoint / SHARD
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        plan_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"missing shards {SHARD}"):
        plan_checkpoint(checkpoint)


def test_index_that_climbs_out_is_refused(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="files outside its folder"):
        plan_checkpoint(checkpoint)


def test_folder_without_weights_or_tokenizer_is_named(checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        plan_checkpoint(checkpoint)
    for path in checkpoint.glob("model*"):
        path.unlink()
    with pytest.raises(VlmportError):
        plan_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector_type": "mlp2x_gelo"}, "did you mean .*mlp2x_gelu"),
        ({"connector_type": None}, "has no 'connector_type'"),
        ({"image_aspect_ratio": "anyres"}, "available: square, pad"),
        ({"vision_feature_select_strategy": "cls"}, "known: patch, cls_patch"),
        ({"vision_feature_layer": -9}, "expected -4 to 3"),
        ({"vision_config": "x"}, "is not an object"),
        ({"vision_config": {"model_type": "dinov3"}}, "did you mean dinov2"),
        ({"vision_config": {"model_type": "vit"}}, "clip_vision_model, dinov2, siglip_vision"),
        ({"text_config": {"model_type": "lama"}}, "did you mean llama"),
    ],
)
def test_unsupported_config_is_a_clear_error(
    changes: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit_config(checkpoint, **changes)
    with pytest.raises(VlmportError, match=message):
        plan_checkpoint(checkpoint)


@dataclass
class _FullDisk:
    """Lets some bytes pass and then fails as a full disk does."""

    room: int

    def __call__(self, descriptor: int, view: memoryview, offset: int) -> int:
        self.room -= len(view)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(view)


def test_full_disk_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmport.export.stream.os.pwrite", _FullDisk(100_000))
    place = tmp_path / "place"
    with pytest.raises(ExportError, match="No space left on device"):
        export(ExportOptions(checkpoint, place / "bundle"), SilentProgress())
    assert not any(place.iterdir())


def test_existing_folders_are_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    place.mkdir()
    (place / "precious.txt").write_text("keep")
    with pytest.raises(ExportError, match="exists already; pass --overwrite"):
        export(ExportOptions(checkpoint, place), SilentProgress())
    with pytest.raises(ExportError, match="is not a bundle"):
        export(ExportOptions(checkpoint, place, overwrite=True), SilentProgress())
    assert (place / "precious.txt").read_text() == "keep"


@pytest.mark.parametrize("max_length", [0, -1, 2049])
def test_max_length_outside_the_model_is_refused(
    max_length: int, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="the model supports 1 to 2048"):
        export(ExportOptions(checkpoint, tmp_path / "b", max_length=max_length), SilentProgress())
    assert not (tmp_path / "b").exists()
