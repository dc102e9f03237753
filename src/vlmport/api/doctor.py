"""Tells which parts of vlmport can run on this machine, and what would make the rest run.

Every module is really imported: an installed package whose libraries do not load is not usable.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

import vlmport
from vlmport.api.extras import EXTRA_OF_MODULE, pip_line

__all__ = ["Check", "Diagnosis", "diagnosis_json", "doctor"]

_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,compute_cap,driver_version",
    "--format=csv,noheader",
)
_BASE_MODULES = ("numpy", "PIL", "tokenizers", "jinja2", "pydantic")
_EXPORT_MODULES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors")
_NOT_USED_YET = "no backend of this vlmport uses it yet"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked for.

    Attributes:
        group: what it is needed for.
        name: what was looked for.
        usable: whether it can be used on this machine.
        found: version, devices, or why it cannot be used.
        advice: what to do so that it can be used; "" if it is usable or nothing can be done.
    """

    group: Literal["run a bundle", "export a checkpoint", "GPU", "serve"]
    name: str
    usable: bool
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a machine can do.

    Attributes:
        vlmport: version.
        python: version and implementation.
        platform: operating system and processor architecture.
        can_run: whether bundles can be run.
        can_export: whether checkpoints can be exported.
        checks: everything that was looked for.
        warnings: what is installed and does harm.
    """

    vlmport: str
    python: str
    platform: str
    can_run: bool
    can_export: bool
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]


_DIAGNOSIS = TypeAdapter(Diagnosis)


def doctor() -> Diagnosis:
    """Look for everything that vlmport can make use of."""
    checks = (*_run_checks(), *_export_checks(), *_gpu_checks(), *_serve_checks())
    return Diagnosis(
        vlmport=vlmport.__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        platform=f"{platform.system()} {platform.machine()}",
        can_run=all(check.usable for check in checks if check.group == "run a bundle"),
        can_export=all(check.usable for check in checks if check.group == "export a checkpoint"),
        checks=checks,
        warnings=tuple(_warnings()),
    )


def diagnosis_json(diagnosis: Diagnosis) -> str:
    """The diagnosis as one JSON object."""
    return _DIAGNOSIS.dump_json(diagnosis, indent=2).decode()


def _run_checks() -> Iterator[Check]:
    for module in _BASE_MODULES:
        fault = _import_fault(module)
        advice = "pip install --force-reinstall vlmport" if fault else ""
        yield Check("run a bundle", module, not fault, fault or _version(module), advice)
    fault = _import_fault("onnxruntime")
    yield Check(
        "run a bundle",
        "onnxruntime",
        not fault,
        fault
        or f"{_version('onnxruntime')}, providers {', '.join(_providers())}; "
        "on the CPU float32 and float16 bundles, no bfloat16",
        f"{pip_line('cpu')}, or with a CUDA GPU: {pip_line('gpu')}" if fault else "",
    )


def _export_checks() -> Iterator[Check]:
    for module in _EXPORT_MODULES:
        fault = _import_fault(module)
        advice = pip_line(EXTRA_OF_MODULE[module]) if fault else ""
        yield Check("export a checkpoint", module, not fault, fault or _version(module), advice)


def _gpu_checks() -> Iterator[Check]:
    gpus = _gpus()
    yield Check("GPU", "CUDA GPU", bool(gpus), "; ".join(gpus) or "none found by nvidia-smi")
    has_provider = "CUDAExecutionProvider" in _providers()
    yield _needs_gpu("onnxruntime CUDA provider", has_provider, "present", bool(gpus))
    for module in ("tensorrt", "tensorrt_rtx", "cuda"):
        fault = _import_fault(module)
        yield _needs_gpu(module, not fault, fault or _version(module), bool(gpus))


def _needs_gpu(name: str, installed: bool, found: str, has_gpu: bool) -> Check:
    if not installed:
        found = "not installed" if found == "present" else found
        wish = "" if has_gpu else "on a machine with a CUDA GPU: "
        return Check("GPU", name, False, found, wish + pip_line("gpu"))
    note = _NOT_USED_YET if has_gpu else "no CUDA GPU to run it on"
    return Check("GPU", name, has_gpu, f"{found}; {note}")


def _serve_checks() -> Iterator[Check]:
    fault = _import_fault("tritonclient")
    found = fault or f"{_version('tritonclient')}; {_NOT_USED_YET}"
    yield Check("serve", "tritonclient", not fault, found, pip_line("triton") if fault else "")


def _warnings() -> Iterator[str]:
    if sys.version_info[:2] != (3, 11):
        yield f"Python {platform.python_version()}: vlmport was tried on Python 3.11 only"
    if importlib.util.find_spec("torchvision") and (fault := _import_fault("torchvision")):
        yield (
            f"torchvision: {fault}; it was built for another torch than the one installed "
            f"({_version('torch')}) and breaks the processors of transformers; vlmport does not "
            "need it: pip uninstall torchvision"
        )


def _import_fault(module: str) -> str:
    """Why a module cannot be imported, in one line; "" if it can."""
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native package raises whatever its loader raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"installed, but does not load: {reason[0][:200]}"
    return ""


def _version(module: str) -> str:
    packages = importlib.metadata.packages_distributions().get(module, [])
    versions: set[str] = {importlib.metadata.version(package) for package in packages}
    return " / ".join(sorted(versions)) or "of unknown version"


def _providers() -> list[str]:
    """Names of the execution providers that the installed onnxruntime was built with."""
    if _import_fault("onnxruntime"):
        return []
    listing: Callable[[], list[str]] = importlib.import_module(
        "onnxruntime"
    ).get_available_providers
    return listing()


def _gpus() -> list[str]:
    """CUDA GPUs, as the driver's own tool names them; no package is needed for that."""
    try:
        answer = subprocess.run(
            _NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [" ".join(line.split()) for line in answer.splitlines() if line.strip()]
