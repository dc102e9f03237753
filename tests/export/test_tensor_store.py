from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from vlmport.errors import CheckpointError
from vlmport.export.tensor_store import PickleFile, SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def test_rows_and_scalars_are_read_as_stored(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "matrix": np.arange(12, dtype=np.float16).reshape(4, 3),
        "scalar": np.array(7, np.int64),
    }
    save_file(arrays, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(file.read_rows("matrix", 1, 3), arrays["matrix"][1:3])
    assert file.read_rows("scalar", 0, 1) == 7
    assert file.tensors["matrix"].nbytes == 24


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_bfloat16_keeps_its_values(kind: str, tmp_path: Path) -> None:
    tensor = torch.randn(3, 5).to(torch.bfloat16)
    path = tmp_path / f"a.{kind}"
    if kind == "bin":
        torch.save({"w": tensor}, path)
    else:
        save_torch_file({"w": tensor}, path)
    file = PickleFile(path) if kind == "bin" else SafetensorsFile(path)
    rows = file.read_rows("w", 1, 3)
    assert rows.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rows.astype(np.float32), tensor[1:3].float().numpy())


def test_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros((64, 64), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated: found \d+ bytes, its header describes"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    ],
)
def test_damaged_header_is_a_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F8", "shape": [2], "data_offsets": [0, 2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]},
        {"shape": [2]},
    ],
)
def test_wrong_entries_are_refused(entry: dict[str, object], tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        SafetensorsFile(path)


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    torch.save({"w": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only"):
        PickleFile(tmp_path / "pytorch_model.bin")
