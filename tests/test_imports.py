from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
EXPORT_TOOLS = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")


def loaded_by(statement: str, candidates: tuple[str, ...]) -> list[str]:
    program = f"import sys; {statement}; print(*[m for m in {candidates!r} if m in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return finished.stdout.split()


def test_the_runtime_imports_none_of_the_export_tools() -> None:
    assert loaded_by("import vlmport.runtime", EXPORT_TOOLS) == []


def test_the_service_is_imported_when_it_is_asked_for() -> None:
    service = ("asyncio", "vlmport.runtime.serving.service")
    assert loaded_by("import vlmport.runtime", service) == []
    assert loaded_by("from vlmport.runtime import GenerationService", service) == [*service]
    assert loaded_by("from vlmport.runtime import *", service) == [*service]


@pytest.mark.parametrize("module", ["vlmport", "vlmport.cli.main", "vlmport.manifest"])
def test_light_modules_stay_light(module: str) -> None:
    heavy = (*EXPORT_TOOLS, "onnxruntime", "numpy", "PIL")
    assert loaded_by(f"import {module}", heavy) == []


def test_the_layers_are_kept() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    finished = subprocess.run(
        [command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout
