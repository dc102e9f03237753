"""What each backend needs on a machine, and which of it is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.backend_names import BACKENDS, BackendName
from vlmport.contract_engines import ENGINES_FOLDER, ENGINES_NAME
from vlmport.errors import InputError, VlmportError, close_matches
from vlmport.machine.gpus import find_gpus
from vlmport.machine.installed import import_fault, installed_version

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "TENSORRT_RTX_PLUGIN",
    "Requirement",
    "backend_named",
    "onnxruntime_providers",
    "require_backend",
    "requirements",
]

TENSORRT_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_TENSORRT_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

_CPU_LINE = "pip install 'vlmport[cpu]'"
_GPU_LINE = "pip install 'vlmport[gpu]'"
_DRIVER_ADVICE = (
    "use a machine with an NVIDIA GPU and a driver for CUDA 13, and give a container --gpus all"
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One thing that a backend needs.

    Attributes:
        name: what was looked for.
        is_met: whether it can be used.
        found: version, devices, or why it cannot be used.
        advice: what to do about it; "" if it is met.
    """

    name: str
    is_met: bool
    found: str
    advice: str = ""


def backend_named(name: str) -> BackendName:
    """The backend of this name.

    Raises:
        InputError: if there is none.
    """
    for backend in BACKENDS:
        if backend == name:
            return backend
    msg = f"backend: found {name!r}; {close_matches(name, BACKENDS)}"
    raise InputError(msg)


def requirements(backend: BackendName) -> tuple[Requirement, ...]:
    """Everything that a backend needs on a machine, met or not; engines belong to a bundle."""
    return tuple(check() for check in _CHECKS[backend])


def require_backend(name: str, bundle: Path, engines: Path | None = None) -> None:
    """Checks that a backend can run a bundle on this machine.

    Args:
        name: of the backend.
        bundle: folder of the bundle.
        engines: folder of TensorRT engines; None for one below the bundle.

    Raises:
        InputError: if there is no such backend, or engines are named for one that takes none.
        VlmportError: if something is missing; all of it at once.
    """
    backend = backend_named(name)
    uses_engines = backend in _TENSORRT_MODULES
    if engines is not None and not uses_engines:
        msg = (
            f"engines: found {engines}; the backend {backend} runs the graphs of the bundle; leave "
            f"it out, or choose the backend {' or '.join(_TENSORRT_MODULES)}"
        )
        raise InputError(msg)
    needed = requirements(backend)
    if uses_engines:
        needed += (_engines(backend, bundle, engines),)
    missing = [need for need in needed if not need.is_met]
    if missing:
        listed = " ".join(
            f"({number}) {need.name}: {need.found}; {need.advice}"
            for number, need in enumerate(missing, 1)
        )
        msg = f"backend {backend}: missing on this machine: {listed}; see `vlmport doctor`"
        raise VlmportError(msg)


def onnxruntime_providers() -> list[str]:
    """Execution providers that the installed onnxruntime was built with; none if it is missing."""
    if import_fault("onnxruntime"):
        return []
    listing: Callable[[], list[str]] = importlib.import_module(
        "onnxruntime"
    ).get_available_providers
    return listing()


def _engines(backend: str, bundle: Path, engines: Path | None) -> Requirement:
    if engines is not None:
        found = [engines] if (engines / ENGINES_NAME).is_file() else []
        place = f"no {ENGINES_NAME} in {engines}"
    else:
        folder = bundle / ENGINES_FOLDER
        found = [path.parent for path in sorted(folder.glob(f"{backend}-[0-9]*/{ENGINES_NAME}"))]
        place = f"none for {backend} in {folder}"
    advice = f"build them with `vlmport build {bundle} --backend {backend}`"
    if not found:
        return Requirement("engines", False, place, advice)
    return Requirement("engines", True, ", ".join(path.name for path in found))


def _module(module: str, pip_line: str) -> Requirement:
    fault = import_fault(module)
    if fault:
        return Requirement(f"module {module}", False, fault, pip_line)
    return Requirement(f"module {module}", True, installed_version(module))


def _onnxruntime() -> Requirement:
    return _module("onnxruntime", f"{_CPU_LINE}, or with a CUDA GPU: {_GPU_LINE}")


def _onnxruntime_gpu() -> Requirement:
    return _module("onnxruntime", _GPU_LINE)


def _cuda_provider() -> Requirement:
    provider = "CUDAExecutionProvider"
    found = onnxruntime_providers()
    if provider in found:
        return Requirement(provider, True, "in the installed onnxruntime")
    words = f"the installed onnxruntime has {', '.join(found)}" if found else "not installed"
    advice = f"pip uninstall onnxruntime, then {_GPU_LINE}: only one of the two can be installed"
    return Requirement(provider, False, words, advice if found else _GPU_LINE)


def _plugin() -> Requirement:
    return _module(TENSORRT_RTX_PLUGIN, _GPU_LINE)


def _tensorrt() -> Requirement:
    return _module(_TENSORRT_MODULES["tensorrt"], _GPU_LINE)


def _tensorrt_rtx() -> Requirement:
    return _module(_TENSORRT_MODULES["tensorrt-rtx"], _GPU_LINE)


def _cuda_bindings() -> Requirement:
    return _module("cuda.bindings", _GPU_LINE)


def _gpu() -> Requirement:
    search = find_gpus()
    if search.fault:
        return Requirement("CUDA GPU", False, search.fault, _DRIVER_ADVICE)
    driver = f"; driver {search.driver}" if search.driver else ""
    return Requirement("CUDA GPU", True, "; ".join(search.gpus) + driver)


_CHECKS: dict[BackendName, tuple[Callable[[], Requirement], ...]] = {
    "onnxruntime": (_onnxruntime,),
    "onnxruntime-cuda": (_onnxruntime_gpu, _cuda_provider, _gpu),
    "onnxruntime-tensorrt-rtx": (_onnxruntime, _plugin, _gpu),
    "tensorrt": (_tensorrt, _cuda_bindings, _gpu),
    "tensorrt-rtx": (_tensorrt_rtx, _cuda_bindings, _gpu),
}
