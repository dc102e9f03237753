from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vlmport.api.doctor import Check, Diagnosis, diagnosis_json, doctor
from vlmport.api.extras import EXTRA_OF_MODULE, missing_module_message
from vlmport.backend_names import BACKENDS
from vlmport.machine.gpus import GpuSearch
from vlmport.machine.requirements import TENSORRT_RTX_PLUGIN


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Makes everyone believe that modules are not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in modules else real(name)
    )


def check_of(diagnosis: Diagnosis, name: str) -> Check:
    return next(check for check in diagnosis.checks if check.name == name)


def test_a_full_environment_can_run_and_export() -> None:
    pytest.importorskip("torch")
    diagnosis = doctor()
    assert diagnosis.can_run
    assert diagnosis.can_export
    assert "CPUExecutionProvider" in check_of(diagnosis, "onnxruntime").found
    assert check_of(diagnosis, "torch").found.startswith("2.")


def test_what_is_missing_comes_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxruntime", "torch", "tritonclient")
    diagnosis = doctor()
    assert not diagnosis.can_run
    assert not diagnosis.can_export
    assert "pip install 'vlmport[cpu]'" in check_of(diagnosis, "onnxruntime").advice
    assert check_of(diagnosis, "torch").advice == "pip install 'vlmport[export]'"
    assert check_of(diagnosis, "tritonclient").advice == "pip install 'vlmport[triton]'"


def test_a_package_that_does_not_load_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    check = check_of(doctor(), "module tensorrt")
    assert not check.usable
    assert check.found == "installed, but does not load: libnvinfer.so.11: cannot open"


def test_a_torchvision_that_does_not_fit_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    warnings = doctor().warnings
    assert any("nms does not exist" in text and "pip uninstall" in text for text in warnings)


def test_a_gpu_is_found_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        listing = "NVIDIA L4,  23034 MiB, 8.9, 580.1\n"
        return subprocess.CompletedProcess([], 0, stdout=listing)

    hide(monkeypatch, "cuda.bindings.runtime")
    monkeypatch.setattr(subprocess, "run", answer)
    check = check_of(doctor(), "CUDA GPU")
    assert check.usable
    assert check.found == "NVIDIA L4, 23034 MiB, 8.9, 580.1"


def test_each_backend_is_shown_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "tensorrt_rtx", TENSORRT_RTX_PLUGIN)
    no_gpu = GpuSearch((), "", "no CUDA driver is installed")
    monkeypatch.setattr("vlmport.machine.requirements.find_gpus", lambda: no_gpu)
    diagnosis = doctor()
    shown = {check.name: check for check in diagnosis.checks if check.group == "backends"}
    assert tuple(shown) == BACKENDS
    assert shown["onnxruntime"].usable
    rtx = shown["tensorrt-rtx"]
    assert (rtx.usable, rtx.found) == (False, "missing: module tensorrt_rtx, CUDA GPU")
    assert "pip install 'vlmport[gpu]'" in rtx.advice
    assert "NVIDIA GPU and a driver" in rtx.advice
    assert "CUDA GPU" in shown["onnxruntime-cuda"].found
    assert f"module {TENSORRT_RTX_PLUGIN}" in shown["onnxruntime-tensorrt-rtx"].found
    assert check_of(diagnosis, "CUDA GPU").found == "no CUDA driver is installed"


def test_a_backend_with_all_it_needs_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = GpuSearch(("NVIDIA L4, 23034 MiB, 8.9",), "for CUDA 13.0", "")
    monkeypatch.setattr("vlmport.machine.requirements.find_gpus", lambda: found)
    check = next(check for check in doctor().checks if check.name == "tensorrt-rtx")
    assert check.usable
    assert check.found.startswith("ready; a bundle also needs engines: `vlmport build")


def test_two_packages_of_onnxruntime_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.packages_distributions()
    both = {**real, "onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: both)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    assert any("onnxruntime and onnxruntime-gpu" in text for text in doctor().warnings)


def test_the_json_has_every_check() -> None:
    diagnosis = doctor()
    document: dict[str, Any] = json.loads(diagnosis_json(diagnosis))
    assert [check["name"] for check in document["checks"]] == [c.name for c in diagnosis.checks]
    assert document["can_run"] is diagnosis.can_run


@pytest.mark.parametrize("module", sorted(EXTRA_OF_MODULE))
def test_a_missing_module_of_an_extra_has_a_message(module: str) -> None:
    message = missing_module_message(f"{module}.inner")
    assert message is not None
    assert f"pip install 'vlmport[{EXTRA_OF_MODULE[module]}]'" in message


def test_a_missing_module_of_no_extra_is_a_fault_of_ours() -> None:
    assert missing_module_message("vlmport.absent") is None
    assert missing_module_message(None) is None
