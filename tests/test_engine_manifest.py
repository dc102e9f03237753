from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmport.contract_engines import (
    ENGINES_NAME,
    AttentionLayer,
    BuildOptions,
    Engine,
    EnginePort,
    EngineProfile,
    EngineSet,
    PortRange,
)
from vlmport.engine_manifest import load_engine_set, save_engine_set
from vlmport.errors import EngineError

ENGINE = Engine(
    graph="decoder",
    file="decoder.engine",
    size=4,
    sha256="0" * 64,
    source_sha256="1" * 64,
    inputs=(EnginePort("past", "float16", ("batch", 2, 64, 16)),),
    outputs=(EnginePort("present", "float16", ("batch", 2, 64, 16), "past"),),
    profiles=(
        EngineProfile("prefill", (PortRange("past", (1, 2), (1, 2), (4, 2)),), None),
        EngineProfile("decode", (), 1024),
    ),
    attention=(
        AttentionLayer("l_In", "l", "float16", 4, 2, 16, "lower_right", "lengths", True, ""),
    ),
    build_seconds=1.5,
    warnings=("strange",),
)
SET = EngineSet(
    schema_version=1,
    version="1.7",
    capability="portable",
    device="",
    graphs_sha256="2" * 64,
    options=BuildOptions("tensorrt-rtx", 4, 64, 32, 1, ("8.9",)),
    engines=(ENGINE,),
    tools={"python": "3.11"},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ENGINE.file).write_bytes(b"plan")
    save_engine_set(tmp_path, SET)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / ENGINES_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_is_read_as_it_was_written(folder: Path) -> None:
    found = load_engine_set(folder)
    assert found == SET
    assert found.engine("decoder") == ENGINE
    assert (found.has_engine("decoder"), found.has_engine("projector")) == (True, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "found no JSON"),
        ("[]", "found schema_version None"),
        ('{"schema_version": 2}', "found schema_version 2; this vlmport reads 1"),
        ('{"schema_version": 1}', "version: .*; capability: .*; engines: "),
    ],
)
def test_damaged_json_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / ENGINES_NAME).write_text(content)
    with pytest.raises(EngineError, match=rf"{message}.*build the engines again"):
        load_engine_set(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine\.json: cannot be read \(No such file"):
        load_engine_set(tmp_path)


def test_an_unknown_key_is_refused(folder: Path) -> None:
    change(folder, surprise=1)
    with pytest.raises(EngineError, match="surprise: "):
        load_engine_set(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("decoder.engine", "found 3 bytes, expected 4"),
        ("other.engine", "other.engine: missing"),
        ("../decoder.engine", "expected the plain name of a file"),
        ("a/decoder.engine", "expected the plain name of a file"),
    ],
)
def test_a_wrong_engine_file_is_refused(folder: Path, file: str, message: str) -> None:
    (folder / ENGINE.file).write_bytes(b"pla")
    save_engine_set(folder, replace(SET, engines=(replace(ENGINE, file=file),)))
    with pytest.raises(EngineError, match=message):
        load_engine_set(folder)


def test_a_link_is_refused(folder: Path) -> None:
    path = folder / ENGINE.file
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(EngineError, match=r"decoder\.engine: expected the plain name"):
        load_engine_set(folder)
