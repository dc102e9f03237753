"""Every name of TensorRT that the code uses exists in both modules that it may run with."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from vlmport.errors import EngineError
from vlmport.runtime.engines import bindings as module
from vlmport.runtime.engines.bindings import Bindings, RtxBindings, load_bindings

SITE = Path(sysconfig.get_path("purelib"))
CODE = Path(module.__file__).parent
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


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx"])
def installed(request: pytest.FixtureRequest) -> dict[str, set[str]]:
    return stub(str(request.param))


def protocol(cls: type) -> set[str]:
    return {name for name in cls.__annotations__ if not name.startswith("__")}


def attributes() -> set[str]:
    """Every name behind a dot in the code that drives TensorRT."""
    trees = [ast.parse(path.read_text()) for path in CODE.glob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_both_modules_have_every_name(installed: dict[str, set[str]]) -> None:
    assert protocol(Bindings) - installed.keys() == set()


def test_the_installed_module_has_every_name() -> None:
    found = load_bindings("tensorrt-rtx")
    names = protocol(Bindings) | protocol(RtxBindings)
    assert [name for name in sorted(names) if not hasattr(found, name)] == []


def test_members_of_one_module_are_members_of_the_other() -> None:
    """Type checkers see `tensorrt` alone; what runs may be `tensorrt_rtx`."""
    full, rtx, names = stub("tensorrt"), stub("tensorrt_rtx"), attributes()
    assert {"add_attention_v2", "key_value_lengths", "build_serialized_network"} <= names
    used = {
        (cls, member)
        for cls in protocol(Bindings) | HANDED_OUT
        for member in full[cls] & names
        if not member.startswith("__")
    }
    assert len(used) > 60
    assert {(cls, member) for cls, member in used if member not in rtx[cls]} == set()


def test_what_rtx_has_alone_stays_apart() -> None:
    assert protocol(RtxBindings) & stub("tensorrt").keys() == set()


@pytest.mark.usefixtures("without_tensorrt")
def test_a_module_that_is_missing_is_named() -> None:
    with pytest.raises(EngineError, match=r"tensorrt: not installed; expected for the backend"):
        load_bindings("tensorrt")
