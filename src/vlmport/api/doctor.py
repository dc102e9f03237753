"""Tells which parts of vlmport can run on this machine, and what would make the rest run.

Every module is really imported: an installed package whose libraries do not load is not usable.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

import vlmport
from vlmport.api.extras import EXTRA_OF_MODULE, pip_line
from vlmport.backend_names import BACKENDS, BackendName
from vlmport.machine.installed import import_fault, installed_version
from vlmport.machine.requirements import Requirement, onnxruntime_providers, requirements

__all__ = ["Check", "Diagnosis", "diagnosis_json", "doctor"]

_BASE_MODULES = ("numpy", "PIL", "tokenizers", "jinja2", "pydantic")
_EXPORT_MODULES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors")
_NOTES: dict[BackendName, str] = {
    "onnxruntime": " on the CPU: float32 and float16 bundles, no bfloat16",
    "tensorrt": "; a bundle also needs engines: `vlmport build BUNDLE --backend tensorrt`",
    "tensorrt-rtx": "; a bundle also needs engines: `vlmport build BUNDLE --backend tensorrt-rtx`",
}


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

    group: Literal["run a bundle", "export a checkpoint", "GPU", "backends", "serve"]
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
    needs = {backend: requirements(backend) for backend in BACKENDS}
    checks = (
        *_run_checks(),
        *_export_checks(),
        *_gpu_checks(needs),
        *_backend_checks(needs),
        *_serve_checks(),
    )
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
        fault = import_fault(module)
        advice = "pip install --force-reinstall vlmport" if fault else ""
        yield Check("run a bundle", module, not fault, fault or installed_version(module), advice)
    fault = import_fault("onnxruntime")
    providers = ", ".join(onnxruntime_providers())
    yield Check(
        "run a bundle",
        "onnxruntime",
        not fault,
        fault or f"{installed_version('onnxruntime')}, providers {providers}",
        f"{pip_line('cpu')}, or with a CUDA GPU: {pip_line('gpu')}" if fault else "",
    )


def _export_checks() -> Iterator[Check]:
    for module in _EXPORT_MODULES:
        fault = import_fault(module)
        advice = pip_line(EXTRA_OF_MODULE[module]) if fault else ""
        yield Check(
            "export a checkpoint", module, not fault, fault or installed_version(module), advice
        )


def _gpu_checks(needs: Mapping[BackendName, Sequence[Requirement]]) -> Iterator[Check]:
    distinct = {need.name: need for backend in BACKENDS[1:] for need in needs[backend]}.values()
    for need in sorted(distinct, key=lambda need: need.name != "CUDA GPU"):
        if need.name != "module onnxruntime":  # it is needed on a CPU, too, and was shown
            yield Check("GPU", need.name, need.is_met, need.found, need.advice)


def _backend_checks(needs: Mapping[BackendName, Sequence[Requirement]]) -> Iterator[Check]:
    for backend, needed in needs.items():
        missing = [need for need in needed if not need.is_met]
        found = f"missing: {', '.join(need.name for need in missing)}" if missing else "ready"
        note = "" if missing else _NOTES.get(backend, "")
        advice = "; ".join(dict.fromkeys(need.advice for need in missing))
        yield Check("backends", backend, not missing, found + note, advice)


def _serve_checks() -> Iterator[Check]:
    fault = import_fault("tritonclient")
    found = fault or f"{installed_version('tritonclient')}; no part of this vlmport uses it yet"
    yield Check("serve", "tritonclient", not fault, found, pip_line("triton") if fault else "")


def _warnings() -> Iterator[str]:
    if sys.version_info[:2] != (3, 11):
        yield f"Python {platform.python_version()}: vlmport was tried on Python 3.11 only"
    both = set(importlib.metadata.packages_distributions().get("onnxruntime", []))
    if len(both) > 1:
        yield (
            f"{' and '.join(sorted(both))}: both fill the folder onnxruntime, and what lies there "
            "is a mixture: uninstall both, then install the one that you want"
        )
    if importlib.util.find_spec("torchvision") and (fault := import_fault("torchvision")):
        yield (
            f"torchvision: {fault}; it was built for another torch than the one installed "
            f"({installed_version('torch')}) and breaks the processors of transformers; vlmport "
            "does not need it: pip uninstall torchvision"
        )
