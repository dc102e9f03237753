"""`vlmport parity --bisect`: a bundle on TensorRT beside the same bundle on the CPU."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.api.bisect import bisect
from vlmport.api.parity import check_source, open_cases
from vlmport.backend_names import DEFAULT_BACKEND
from vlmport.errors import InputError, ParityError
from vlmport.manifest import load_manifest

if TYPE_CHECKING:
    from vlmport.api.bisect import Side
    from vlmport.api.bisect_report import BisectReport
    from vlmport.api.parity import ParityOptions
    from vlmport.api.progress import Progress
    from vlmport.contract_engines import TensorRTName

__all__ = ["bisect_bundle", "bisect_side"]

# Of the built-in questions: each runs on three sides, and large models take minutes on a CPU.
_MOST_CASES = 2
_DECODE_STEPS = 4


def bisect_bundle(options: ParityOptions, progress: Progress) -> BisectReport:
    """Searches a backend for the first graph and layer that leave tolerance.

    Args:
        options: what to compare; `backend` is what is searched.
        progress: is told of every run.

    Raises:
        InputError: if the backend cannot be searched, or an image or an option cannot be used.
        EngineError: if this machine lacks what the backend needs, or a graph does not build.
        ParityError: if the bundle was made from another checkpoint, has integer weights or room
            for no case.
        BundleError: if the bundle cannot be opened.
    """
    manifest = load_manifest(options.bundle)
    _check(options)
    if manifest.quantization is not None and manifest.quantization.has_integer_layers:
        msg = (
            f"{options.bundle}: its layers have integer weights ({manifest.quantization.name}), "
            "for whose inner values there are no tolerances; expected a bundle of fp32, fp16 or "
            "bf16; search the one that it was quantized from"
        )
        raise ParityError(msg)
    progress.start(f"opening {options.backend}")
    from vlmport.api.bisect_tensorrt import open_tensorrt_side

    # First: a machine without a GPU is told at once.
    name: TensorRTName = "tensorrt" if options.backend == "tensorrt" else "tensorrt-rtx"
    candidate = open_tensorrt_side(options.bundle, name)
    check_source(options.checkpoint, options.bundle, manifest, progress)
    return bisect_side(options, candidate, progress)


def bisect_side(options: ParityOptions, candidate: Side, progress: Progress) -> BisectReport:
    """The same with a side that is opened already; `options.backend` is passed over."""
    # PyTorch's packages and ONNX Runtime take seconds to import.
    from vlmport.api.bisect_case import BundleCase
    from vlmport.api.bisect_onnxruntime import OnnxRuntimeSide
    from vlmport.api.reference_answers import ask_reference
    from vlmport.runtime import Request
    from vlmport.runtime.messages import parse_messages

    manifest = load_manifest(options.bundle)
    on_cpu = replace(options, backend=DEFAULT_BACKEND, engines=None)
    opened, cases, _ = open_cases(on_cpu, manifest, progress)
    cases = cases[:_MOST_CASES]
    requests = [
        Request(messages=parse_messages(case.messages), images=case.images) for case in cases
    ]
    reference = OnnxRuntimeSide(options.bundle, "as_bundle")
    is_half = manifest.precision != "float32"
    exact = OnnxRuntimeSide(options.bundle, "float32") if is_half else None
    steps = min(_DECODE_STEPS, options.max_new_tokens)
    with tempfile.TemporaryDirectory(prefix="vlmport.") as folder:
        answers = ask_reference(
            opened.model, requests, Path(folder), progress, max_new_tokens=steps
        )
        case = BundleCase(options.bundle, opened, reference, answers, cases, steps)
        return bisect(case, candidate, reference, exact, progress)


def _check(options: ParityOptions) -> None:
    if options.backend not in ("tensorrt", "tensorrt-rtx"):
        msg = (
            f"backend: found {options.backend!r}; --bisect searches tensorrt or tensorrt-rtx; add "
            "--backend tensorrt-rtx"
        )
        raise InputError(msg)
    if options.engines is not None or options.against is not None:
        given = "--engines" if options.engines is not None else "--against"
        msg = (
            f"{given}: --bisect builds engines of its own, with inner values as outputs, and "
            f"compares them with the bundle on the CPU; leave {given} out"
        )
        raise InputError(msg)
    if options.max_new_tokens < 1:
        msg = f"max_new_tokens: found {options.max_new_tokens}; expected 1 or more"
        raise InputError(msg)
