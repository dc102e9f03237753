"""Opens a checkpoint folder: its config.json and its files of weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmport.errors import CheckpointError
from vlmport.export.tensor_store import WeightFile, open_weight_file

__all__ = ["Checkpoint", "open_checkpoint", "read_json", "weight_files"]

# In order of preference: safetensors before pickles, sharded before single.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a config.json.

    Attributes:
        path: the folder.
        config: the parsed config.json.
        prompt_template: name of the prompt form that the user chose; None to let the family choose.
    """

    path: Path
    config: dict[str, Any]
    prompt_template: str | None = None

    @property
    def model_type(self) -> str:
        """config.json's model_type, "" if it has none."""
        return str(self.config.get("model_type", ""))

    def needed(self, name: str) -> Any:
        """A value of config.json.

        Raises:
            CheckpointError: if it is missing or null.
        """
        if self.config.get(name) is None:
            msg = (
                f"{self.path}/config.json: has no {name!r}; expected the config.json that the "
                "training run wrote"
            )
            raise CheckpointError(msg)
        return self.config[name]

    def section(self, name: str) -> dict[str, Any]:
        """An object of config.json.

        Raises:
            CheckpointError: if it is missing or no object.
        """
        section = self.needed(name)
        if not isinstance(section, dict):
            msg = f"{self.path}/config.json: {name!r} is not an object; download it again"
            raise CheckpointError(msg)
        return section


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint folder without reading weights.

    Raises:
        CheckpointError: if there is no such folder, or no readable config.json in it.
    """
    if not path.exists():
        msg = f"{path}: no such checkpoint; expected a folder with config.json and weights"
        raise CheckpointError(msg)
    if not path.is_dir():
        msg = f"{path}: a file; expected the folder that holds config.json and the weights"
        raise CheckpointError(msg)
    if not (path / "config.json").is_file():
        msg = (
            f"{path}: has no config.json; expected a checkpoint folder as save_pretrained or the "
            "training run wrote it"
        )
        raise CheckpointError(msg)
    return Checkpoint(path, read_json(path / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        CheckpointError: if the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); check the file and its permissions"
        raise CheckpointError(msg) from error
    except ValueError as error:
        msg = f"{path}: not valid JSON ({error}); download the file again"
        raise CheckpointError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path}: holds a JSON {type(content).__name__}; expected an object"
        raise CheckpointError(msg)
    return content


def weight_files(folder: Path) -> list[WeightFile]:
    """Opens the weights of one folder: sharded or single, safetensors or pickled state dict.

    Raises:
        CheckpointError: if there are none, or shards that the index names are missing.
    """
    for name in _INDEXES:
        if (folder / name).is_file():
            return [open_weight_file(shard) for shard in _shards(folder / name)]
    for name in _SINGLES:
        if (folder / name).is_file():
            return [open_weight_file(folder / name)]
    msg = (
        f"{folder}: no weights; expected one of {', '.join((*_SINGLES, *_INDEXES))}; "
        "download the missing files"
    )
    raise CheckpointError(msg)


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index}: has no weight_map; download the file again"
        raise CheckpointError(msg)
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        msg = f"{index}: names files outside its folder: {', '.join(outside)}; do not trust it"
        raise CheckpointError(msg)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        msg = f"{index.parent}: missing shards {', '.join(missing)}; download them"
        raise CheckpointError(msg)
    return [index.parent / name for name in names]
