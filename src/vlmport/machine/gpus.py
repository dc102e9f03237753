"""Finds the CUDA GPUs of this machine without starting anything on them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

from vlmport.machine.installed import import_fault

__all__ = ["GpuSearch", "find_gpus"]

_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,compute_cap,driver_version",
    "--format=csv,noheader",
)


@dataclass(frozen=True, slots=True)
class GpuSearch:
    """What was found.

    Attributes:
        gpus: each GPU in words: name, memory, compute capability.
        driver: the CUDA driver in words; "" if it is not known.
        fault: why no GPU can be used; "" if one can.
    """

    gpus: tuple[str, ...]
    driver: str
    fault: str


def find_gpus() -> GpuSearch:
    """Asks the CUDA runtime, or the driver's own tool where cuda-bindings is not installed."""
    return _by_nvidia_smi() if import_fault("cuda.bindings.runtime") else _by_cuda_bindings()


def _by_cuda_bindings() -> GpuSearch:
    from cuda.bindings import runtime as cuda_runtime

    cuda: Any = cuda_runtime  # its functions have no annotations
    status, count = cuda.cudaGetDeviceCount()
    _, version = cuda.cudaDriverGetVersion()
    driver = f"for CUDA {version // 1000}.{version % 1000 // 10}" if version else ""
    if status == cuda.cudaError_t.cudaSuccess and count:
        return GpuSearch(tuple(_words(cuda, index) for index in range(count)), driver, "")
    answer = f"cudaGetDeviceCount answers {cuda.cudaError_t(status).name}"
    if not version:
        return GpuSearch((), "", f"no CUDA driver is installed ({answer})")
    return GpuSearch((), driver, f"the CUDA driver ({driver}) shows no GPU ({answer})")


def _words(cuda: Any, index: int) -> str:
    status, properties = cuda.cudaGetDeviceProperties(index)
    if status != cuda.cudaError_t.cudaSuccess:
        return f"GPU {index} ({cuda.cudaError_t(status).name})"
    name = properties.name.decode(errors="replace").rstrip("\0")
    memory = properties.totalGlobalMem / 2**20
    return f"{name}, {memory:.0f} MiB, {properties.major}.{properties.minor}"


def _by_nvidia_smi() -> GpuSearch:
    try:
        answer = subprocess.run(
            _NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return GpuSearch((), "", "none found by nvidia-smi")
    gpus = tuple(" ".join(line.split()) for line in answer.splitlines() if line.strip())
    return GpuSearch(gpus, "", "" if gpus else "none found by nvidia-smi")
