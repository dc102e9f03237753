from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from vlmport.machine import gpus
from vlmport.machine.gpus import find_gpus

cuda: Any = pytest.importorskip("cuda.bindings.runtime")


def answer(monkeypatch: pytest.MonkeyPatch, status: str, count: int, version: int) -> None:
    """Makes the CUDA runtime answer as it would on another machine."""
    error = cuda.cudaError_t
    properties = SimpleNamespace(
        name=b"NVIDIA L4\0\0", totalGlobalMem=23034 * 2**20, major=8, minor=9
    )
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (getattr(error, status), count))
    monkeypatch.setattr(cuda, "cudaDriverGetVersion", lambda: (error.cudaSuccess, version))
    monkeypatch.setattr(cuda, "cudaGetDeviceProperties", lambda _: (error.cudaSuccess, properties))


def test_gpus_are_named_by_the_cuda_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "cudaSuccess", 2, 13010)
    search = find_gpus()
    assert search.gpus == ("NVIDIA L4, 23034 MiB, 8.9",) * 2
    assert (search.driver, search.fault) == ("for CUDA 13.1", "")


def test_no_driver_is_told_from_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "cudaErrorInsufficientDriver", 0, 0)
    assert find_gpus().fault == (
        "no CUDA driver is installed (cudaGetDeviceCount answers cudaErrorInsufficientDriver)"
    )
    answer(monkeypatch, "cudaErrorInsufficientDriver", 0, 12040)
    assert find_gpus().fault == (
        "the CUDA driver (for CUDA 12.4) shows no GPU "
        "(cudaGetDeviceCount answers cudaErrorInsufficientDriver)"
    )


def test_a_driver_that_shows_no_gpu_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "cudaErrorNoDevice", 0, 13000)
    assert "cudaErrorNoDevice" in find_gpus().fault


def test_without_cuda_bindings_or_nvidia_smi_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(gpus, "import_fault", lambda _: "not installed")
    monkeypatch.setattr(subprocess, "run", fail)
    assert find_gpus().fault == "none found by nvidia-smi"
