"""Opens a bundle with the backend that a user chose by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import InputError
from vlmport.machine.requirements import backend_named, require_backend

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import Backend

__all__ = ["open_backend"]


def open_backend(
    name: str,
    bundle: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    engines: Path | None = None,
    verify: bool = True,
    elsewhere: Collection[str] = (),
) -> Backend:
    """Opens what computes a bundle's graphs; only the modules that it needs are imported.

    Args:
        name: one of `requirements.BACKENDS`.
        bundle: folder of the bundle, whose files have been checked.
        manifest: its manifest.
        threads: worker threads of ONNX Runtime; None for the cores that this process may use.
        engines: folder of TensorRT engines; None for the one below the bundle that fits here.
        verify: whether the digests of engines are checked.
        elsewhere: graphs that are not opened, because something else computes them.

    Raises:
        InputError: if there is no such backend, or an option is not one of its own.
        VlmportError: if something that the backend needs is missing on this machine.
        BundleError: if a graph cannot be loaded.
        EngineError: if an engine cannot be used.
    """
    backend = backend_named(name)
    require_backend(name, bundle, engines)
    if backend == "onnxruntime":
        from vlmport.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, manifest, threads, elsewhere)
    if backend == "onnxruntime-cuda" or backend == "onnxruntime-tensorrt-rtx":
        from vlmport.runtime.backends.onnxruntime_device import OnnxRuntimeDeviceBackend
        from vlmport.runtime.backends.onnxruntime_provider import CUDA, TENSORRT_RTX

        provider = CUDA if backend == "onnxruntime-cuda" else TENSORRT_RTX
        return OnnxRuntimeDeviceBackend(bundle, manifest, provider, threads, elsewhere)
    if threads is not None:
        msg = f"threads: found {threads}; the backend {name} has no worker threads; leave it out"
        raise InputError(msg)
    from vlmport.runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, manifest, backend, engines, verify=verify, elsewhere=elsewhere)
