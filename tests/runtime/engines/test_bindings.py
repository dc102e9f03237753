"""Both TensorRT modules have what vlmport uses of them, as the type checkers were told."""

from __future__ import annotations

import ast
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
from vlmport.runtime.engines.bindings import Bindings, RtxBindings, load_bindings

SITE = Path(sysconfig.get_path("purelib"))
CODE = Path(bindings.__file__).parent
# What the modules' functions hand out, beside the classes that the code names itself.
HANDED_OUT = {
    "IAttention",
    "IBuilderConfig",
    "ICudaEngine",
    "IHostMemory",
    "ILayer",
    "INetworkDefinition",
    "IOptimizationProfile",
    "ITensor",
    "ITimingCache",
    "ParserError",
}
# What the full TensorRT has. Its bindings are imported in a process of their own: their libraries
# are empty, and a second module of the same C++ types does not go into one that has TensorRT-RTX.
NAMES = "import json, tensorrt_bindings as trt; print(json.dumps(sorted(vars(trt))))"


@pytest.fixture(scope="module")
def full_names(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    environment = environment_of_bindings(tmp_path_factory.mktemp("libraries"))
    command = [sys.executable, "-c", NAMES]
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    return frozenset(json.loads(output))


def protocol(cls: type[Any]) -> set[str]:
    return set(cls.__annotations__)


def stub(name: str) -> dict[str, set[str]]:
    """Class -> its members, of stubs that scripts/tensorrt_stubs.py made of the real bindings."""
    tree = ast.parse((SITE / f"{name}-stubs" / "__init__.pyi").read_text())
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def members(node: ast.ClassDef) -> set[str]:
        names = set()
        for part in node.body:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                names.add(part.name)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                names.add(part.target.id)
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return names.union(*(members(found[base]) for base in bases if base in found))

    return {name: members(node) for name, node in found.items()}


def attributes() -> set[str]:
    """Every name behind a dot in the code that drives TensorRT."""
    trees = [ast.parse(path.read_text()) for path in CODE.glob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_every_name_is_in_the_full_tensorrt(full_names: frozenset[str]) -> None:
    assert protocol(Bindings) - full_names == set()
    assert "NoSuchName" not in full_names


def test_every_name_is_in_tensorrt_rtx() -> None:
    module = load_bindings("tensorrt-rtx")
    names = protocol(Bindings) | protocol(RtxBindings)
    assert [name for name in sorted(names) if not hasattr(module, name)] == []


def test_what_rtx_has_alone_stays_apart(full_names: frozenset[str]) -> None:
    assert protocol(RtxBindings) & full_names == set()


def test_members_of_one_module_are_members_of_the_other() -> None:
    """Type checkers see `tensorrt` alone; what runs may be `tensorrt_rtx`."""
    full, rtx, names = stub("tensorrt"), stub("tensorrt_rtx"), attributes()
    assert {"add_attention_v2", "key_value_lengths", "build_serialized_network"} <= names
    used = {
        (cls, member)
        for cls in (protocol(Bindings) | HANDED_OUT) - {"__name__", "__version__"}
        for member in full[cls] & names
        if not member.startswith("__")
    }
    assert len(used) > 60
    assert {(cls, member) for cls, member in used if member not in rtx[cls]} == set()


def test_the_stubs_are_those_of_the_installed_bindings(tmp_path: Path) -> None:
    write_stubs(tmp_path)
    for package in ("tensorrt-stubs", "tensorrt_rtx-stubs"):
        fresh = (tmp_path / package / "__init__.pyi").read_text()
        assert fresh == (SITE / package / "__init__.pyi").read_text()
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
