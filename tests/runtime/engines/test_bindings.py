"""Both TensorRT modules have what vlmport uses of them, as the type checkers were told."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from tensorrt_stubs import environment_of_bindings, write_stubs

from vlmport.errors import EngineError
from vlmport.runtime.engines import bindings
from vlmport.runtime.engines.bindings import Bindings, load_bindings

# What the full TensorRT has. Its bindings are imported in a process of their own: their libraries
# are empty, and a second module of the same C++ types does not go into one that has TensorRT-RTX.
NAMES = "import json, tensorrt_bindings as trt; print(json.dumps(sorted(vars(trt))))"


@pytest.fixture(scope="module")
def full_names(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    environment = environment_of_bindings(tmp_path_factory.mktemp("libraries"))
    command = [sys.executable, "-c", NAMES]
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    return frozenset(json.loads(output))


def used(protocol: type[Any]) -> frozenset[str]:
    return frozenset(protocol.__annotations__)


def test_every_name_is_in_the_full_tensorrt(full_names: frozenset[str]) -> None:
    assert used(Bindings) - full_names == set()
    assert "NoSuchName" not in full_names


def test_every_name_is_in_tensorrt_rtx() -> None:
    module = load_bindings("tensorrt-rtx")
    assert [name for name in sorted(used(Bindings)) if not hasattr(module, name)] == []


def test_the_stubs_are_those_of_the_installed_bindings(tmp_path: Path) -> None:
    write_stubs(tmp_path)
    installed = Path(sysconfig.get_path("purelib"))
    for package in ("tensorrt-stubs", "tensorrt_rtx-stubs"):
        fresh = (tmp_path / package / "__init__.pyi").read_text()
        assert fresh == (installed / package / "__init__.pyi").read_text()
        assert "class IKVCacheUpdateLayer" in fresh


def test_a_module_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "_MODULES", {"tensorrt": "no_such_tensorrt"})
    load_bindings.cache_clear()
    with pytest.raises(EngineError, match=r"no_such_tensorrt: not installed; .* pip install"):
        load_bindings("tensorrt")
    load_bindings.cache_clear()


def test_a_module_whose_libraries_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"lib{name}.so.11: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    load_bindings.cache_clear()
    with pytest.raises(EngineError, match=r"tensorrt: installed, but does not load \(libtensorrt"):
        load_bindings("tensorrt")
    load_bindings.cache_clear()
