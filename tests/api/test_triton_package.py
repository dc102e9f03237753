"""The modules that a repository carries run without an installed vlmport."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.triton_configs import repository

from vlmport.api import triton_package
from vlmport.api.triton_package import needed_modules

# Imports every module; -I leaves PYTHONPATH and the working folder out. An installed vlmport is
# shadowed: each module must come from the repository.
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import vlmport
names = [one.name for one in pkgutil.walk_packages(vlmport.__path__, "vlmport.")]
for name in names:
    importlib.import_module(name)
ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vlmport"}
outside = [name for name, module in ours.items() if not module.__file__.startswith(sys.argv[1])]
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "typer", "rich"} & {*sys.modules}
print(len(names), outside, sorted(heavy))
"""


def run_isolated(program: str, *arguments: object) -> str:
    command = [sys.executable, "-I", "-B", "-c", program, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("backend", ["python", "tensorrt"])
def test_the_carried_package_imports_alone(backend: str) -> None:
    home = repository("tinyllava", backend) / "vlm" / "1"
    number = len([path for path in (home / "vlmport").rglob("*.py") if path.stem != "__init__"])
    packages = len([*(home / "vlmport").rglob("*/__init__.py")])
    assert run_isolated(IMPORT_ALL, home).split(" ", 1) == [str(number + packages), "[] []\n"]


def test_the_carried_package_answers(tmp_path: Path) -> None:
    """A bundle of a repository, run by its own package alone, with NumPy and ONNX Runtime."""
    home = repository("tinyllava", "python") / "vlm" / "1"
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from PIL import Image
from vlmport.runtime import VisionLanguageModel
model = VisionLanguageModel.load(sys.argv[1] + "/bundle", threads=1)
image = Image.new("RGB", (64, 64), (200, 30, 30))
print(model.generate(prompt="What is this?", images=[image], max_new_tokens=4).generated_tokens)
"""
    assert int(run_isolated(program, home)) >= 1


def test_what_is_needed_is_found_by_imports() -> None:
    needed = needed_modules(("vlmport.runtime.backends",))
    assert {"vlmport", "vlmport.contract", "vlmport.runtime.backends.tensorrt"} <= needed
    # Imported inside of functions alone.
    assert "vlmport.runtime.backends.onnxruntime_device" in needed
    stages = {"api", "cli", "export", "graphs", "calibration"}
    assert not [name for name in needed if stages & {*name.split(".")[1:2]}]


def test_every_kind_of_import_is_followed_but_those_for_type_checkers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vlmport"
    (package / "part" / "inner").mkdir(parents=True)
    sources = {
        "__init__.py": "",
        "top.py": "",
        "late.py": "import json",
        "shown.py": "",
        "other.py": "",
        "part/__init__.py": "from vlmport import top, nothing",
        "part/inner/__init__.py": "",
        "part/inner/deep.py": "def run():\n    import vlmport.late\n",
        "part/first.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import vlmport.shown\nelse:\n    import vlmport.other\n",
    }
    for name, source in sources.items():
        (package / name).write_text(source, encoding="utf-8")
    monkeypatch.setattr(triton_package, "_PACKAGE", package)
    expected = {name.removesuffix(".py").replace("/", ".") for name in sources} - {"shown"}
    names = {f"vlmport.{name}".removesuffix(".__init__") for name in expected}
    assert needed_modules(("vlmport.part",)) == names
    triton_package.copy_package(tmp_path / "copy", ("vlmport.part",))
    copied = {
        path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.py")
    }
    assert copied == sources.keys() - {"shown.py"}


def test_writing_needs_onnx_for_engines_alone() -> None:
    program = (
        "import sys, vlmport.api.triton; print([m for m in ('onnx', 'torch') if m in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout == "[]\n"
