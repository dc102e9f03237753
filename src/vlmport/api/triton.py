"""Writes a model repository of Triton Inference Server for a bundle."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import vlmport
from vlmport.api.bundle_folder import new_bundle
from vlmport.api.triton_files import copy_bundle, copy_graph, write_model, write_root_files
from vlmport.api.triton_folder import check_place, write_marker
from vlmport.api.triton_models import Layout, model_configs
from vlmport.api.triton_package import copy_package
from vlmport.errors import InputError, close_matches
from vlmport.manifest import graphs_digest, load_manifest, verify_files
from vlmport.runtime.serving.options import ServingOptions
from vlmport.runtime.triton.graph_models import served_graphs
from vlmport.runtime.triton.names import ModelNames

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.api.progress import Progress
    from vlmport.contract import Manifest

__all__ = ["TRITON_BACKENDS", "TritonOptions", "TritonReport", "write_repository"]

TritonBackend = Literal["python", "onnxruntime", "tensorrt"]
TRITON_BACKENDS: tuple[TritonBackend, ...] = get_args(TritonBackend)
_DEVICES = ("cpu", "gpu")
# What a user gets who names no device: TensorRT runs on a GPU alone.
_USUAL_DEVICE = {"python": "cpu", "onnxruntime": "gpu", "tensorrt": "gpu"}


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """What `vlmport triton` was asked for.

    Attributes:
        bundle: folder of the bundle.
        repository: folder to write.
        backend: what runs the image graphs: "python", "onnxruntime" or "tensorrt".
        name: of the main model and in front of the others' names; None for "vlm" and no prefix.
        device: "cpu" or "gpu"; None for the backend's usual one.
        instances: copies of each model but the main one, which batches in one.
        max_batch: requests that are decoded together, and pictures that an image graph takes.
        overwrite: whether a repository of vlmport in that place is replaced.
    """

    bundle: Path
    repository: Path
    backend: str = "python"
    name: str | None = None
    device: str | None = None
    instances: int = 1
    max_batch: int = ServingOptions().num_slots
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class TritonReport:
    """What was written.

    Attributes:
        repository: its folder.
        models: (name, platform, max_batch_size) of each.
        needs_engines: whether `build_engines.sh` must run before the server starts.
        size: bytes of all files.
        seconds: the whole took.
    """

    repository: Path
    models: tuple[tuple[str, str, int], ...]
    needs_engines: bool
    size: int
    seconds: float


def write_repository(options: TritonOptions, progress: Progress) -> TritonReport:
    """Writes a complete model repository, which may be moved anywhere.

    Everything is written into a temporary folder, which takes the repository's name at the very
    end; whatever fails leaves nothing behind. The same bundle and options give the same bytes.

    Args:
        options: see `TritonOptions`.
        progress: is told of the files.

    Raises:
        InputError: if an option cannot be used, or the place is taken.
        BundleError: if the bundle is missing, damaged or newer than this vlmport.
        GraphError: if a graph is not of the form that engines need.
    """
    started = time.monotonic()
    layout = _layout(options)
    check_place(options.repository, overwrite=options.overwrite)
    manifest = load_manifest(options.bundle)
    _check_precision(manifest, layout)
    progress.start("checking the bundle")
    verify_files(options.bundle, manifest, hashes=True)
    configs = model_configs(manifest, layout)
    progress.start("writing the repository", len(configs) + 1)
    with new_bundle(options.repository, error=InputError) as folder:
        home = folder / layout.names.main / "1"
        copy_bundle(options.bundle, manifest, home / "bundle", layout.own_graphs(manifest))
        copy_package(home / "vlmport")
        progress.advance(1)
        for config in configs:
            write_model(folder, config, layout)
            progress.advance(1)
        if layout.backend == "onnxruntime":
            for graph in served_graphs(manifest):
                copy_graph(options.bundle, manifest, graph, folder / layout.names.of(graph) / "1")
        if layout.backend == "tensorrt":
            from vlmport.api.triton_engines import write_engine_step  # needs onnx

            write_engine_step(options.bundle, manifest, layout, folder)
        write_root_files(folder, manifest, layout, configs)
        write_marker(folder, _marker(manifest, layout, [config.name for config in configs]))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    progress.finish()
    return TritonReport(
        options.repository,
        tuple((config.name, config.platform, config.max_batch_size) for config in configs),
        layout.backend == "tensorrt",
        size,
        time.monotonic() - started,
    )


def _layout(options: TritonOptions) -> Layout:
    """Refuses what is not known or out of range, before anything is read."""
    backend = _backend_named(options.backend)
    device = options.device or _USUAL_DEVICE[backend]
    if device not in _DEVICES:
        msg = f"device: found {device!r}; {close_matches(device, _DEVICES)}"
        raise InputError(msg)
    if backend == "tensorrt" and device == "cpu":
        msg = (
            "device: found 'cpu'; TensorRT computes on a GPU alone; leave --device out, or take "
            "--backend onnxruntime or python"
        )
        raise InputError(msg)
    counts = {"instances": options.instances, "max_batch": options.max_batch}
    faults = [
        f"{key}: found {found}; expected 1 or more" for key, found in counts.items() if found < 1
    ]
    if faults:
        raise InputError("; ".join(faults))
    return Layout(
        names=ModelNames(options.name),
        backend=backend,
        is_on_gpu=device == "gpu",
        instances=options.instances,
        serving=ServingOptions(num_slots=options.max_batch),
    )


def _backend_named(name: str) -> TritonBackend:
    for backend in TRITON_BACKENDS:
        if backend == name:
            return backend
    msg = f"backend: found {name!r}; {close_matches(name, TRITON_BACKENDS)}"
    raise InputError(msg)


def _check_precision(manifest: Manifest, layout: Layout) -> None:
    """numpy, by which Python models hand on tensors, and CPU kernels have no bfloat16."""
    if manifest.precision != "bfloat16":
        return
    if layout.backend == "python" or not layout.is_on_gpu:
        where = "Python models" if layout.backend == "python" else "a CPU"
        msg = (
            f"precision: found a bfloat16 bundle for {where}, which cannot take bfloat16 tensors; "
            "expected float32 or float16; export the checkpoint with --precision fp16 or fp32, or "
            "take --backend tensorrt"
        )
        raise InputError(msg)


def _marker(manifest: Manifest, layout: Layout, models: list[str]) -> dict[str, object]:
    return {
        "vlmport": vlmport.__version__,
        "backend": layout.backend,
        "models": models,
        "family": manifest.family,
        "variant": manifest.variant,
        "precision": manifest.precision_words,
        "graphs_sha256": graphs_digest(manifest),
        "tools": manifest.tools,
    }
