"""Does a bundle answer as the PyTorch model of its checkpoint does?

`parity` opens both and asks them the same cases; `compare` is its core, which knows neither
PyTorch nor ONNX Runtime and can be given anything that behaves like them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.api.builtin_cases import make_cases
from vlmport.api.parity_answers import ERROR_BIN_EDGES
from vlmport.api.parity_compare import compare
from vlmport.api.parity_report import REPORT_SCHEMA_VERSION, ParityReport, worst_verdict
from vlmport.api.tolerances import TOLERANCES
from vlmport.api.versions import library_versions
from vlmport.backend_names import DEFAULT_BACKEND
from vlmport.errors import CheckpointError, InputError, ParityError
from vlmport.machine.requirements import require_backend
from vlmport.manifest import file_entry, load_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.builtin_cases import Case
    from vlmport.api.parity_bundle import OpenedBundle
    from vlmport.api.parity_model import ComparedModel
    from vlmport.api.parity_report import CaseReport
    from vlmport.api.progress import Progress
    from vlmport.contract import FileEntry, Manifest

__all__ = [
    "ParityOptions",
    "check_source",
    "compare",
    "make_report",
    "open_cases",
    "parity",
    "select_cases",
]


@dataclass(frozen=True, slots=True)
class ParityOptions:
    """What to compare, and on what.

    Attributes:
        checkpoint: folder of the PyTorch model.
        bundle: folder that was exported from it.
        images: pictures, all of one chat; none for built-in ones.
        prompt: one user turn; None for built-in ones.
        max_new_tokens: tokens to compare in each answer, unless it ends before.
        family_file: Python file that defines one more family; it is run.
        against: folder of the float bundle that a quantized one was made from; only
            `vlmport.api.quantized_parity` takes it.
        backend: what computes the bundle; see `VisionLanguageModel.load`.
        engines: folder of TensorRT engines; None for the one below the bundle that fits.
    """

    checkpoint: Path
    bundle: Path
    images: tuple[Path, ...] = ()
    prompt: str | None = None
    max_new_tokens: int = 64
    family_file: Path | None = None
    against: Path | None = None
    backend: str = DEFAULT_BACKEND
    engines: Path | None = None


def parity(options: ParityOptions, progress: Progress) -> ParityReport:
    """Compares a bundle with the PyTorch model of its checkpoint.

    Raises:
        ParityError: if the bundle was made from another checkpoint, has room for no case, or has
            integer weights, which `vlmport.api.quantized_parity` compares.
        InputError: if an image or an option cannot be used.
        BundleError: if the bundle cannot be opened.
        CheckpointError: if the checkpoint cannot be opened.
        ExportError: if the family file cannot be used.
    """
    # PyTorch and ONNX Runtime take seconds to import and are not needed to read or show reports.
    from vlmport.export.family import load_reference

    started = time.perf_counter()
    if options.max_new_tokens < 1:
        msg = f"max_new_tokens: found {options.max_new_tokens}; expected 1 or more"
        raise InputError(msg)
    manifest = load_manifest(options.bundle)
    _check_is_float(options, manifest)
    # Told before the checkpoint is hashed, which takes minutes if it is large.
    require_backend(options.backend, options.bundle, options.engines)
    check_source(options.checkpoint, options.bundle, manifest, progress)
    model, cases, skipped = open_cases(options, manifest, progress)
    progress.start("loading the PyTorch model")
    precision = manifest.precision
    where = (options.family_file, manifest.source.prompt_template or None)
    reference = load_reference(options.checkpoint, precision, *where)
    is_half = precision != "float32"
    float32 = load_reference(options.checkpoint, "float32", *where) if is_half else None
    progress.finish()
    reports = compare(
        reference,
        model,
        cases,
        options.max_new_tokens,
        progress,
        precision=precision,
        float32=float32,
    )
    report = make_report(options, manifest, reports, backend=model.backend, skipped=skipped)
    return replace(report, seconds=time.perf_counter() - started)


def _check_is_float(options: ParityOptions, manifest: Manifest) -> None:
    quantization = manifest.quantization
    if quantization is not None and quantization.has_integer_layers:
        msg = (
            f"{options.bundle}: its layers have integer weights ({quantization.name}), for which "
            "no number equals PyTorch's; compare it by vlmport.api.quantized_parity"
        )
        raise ParityError(msg)
    if options.against is not None:
        msg = (
            f"against: found {options.against} for {options.bundle}, which has no integer weights; "
            "expected it beside a bundle of `vlmport quantize`; leave it out"
        )
        raise ParityError(msg)


def open_cases(
    options: ParityOptions, manifest: Manifest, progress: Progress
) -> tuple[OpenedBundle, tuple[Case, ...], tuple[str, ...]]:
    """Opens the bundle, and selects what it can be asked; see `select_cases`.

    Raises:
        ParityError: if there is nothing that it can be asked.
        InputError: if an image or the backend cannot be used.
        BundleError: if the bundle cannot be opened.
    """
    from vlmport.api.parity_bundle import open_bundle

    progress.start("opening the bundle")
    bundle = open_bundle(options.bundle, options.backend, options.engines)
    for image in options.images:
        bundle.image_inputs(image)  # an unusable picture is told before PyTorch loads
    wanted = make_cases(options.images, options.prompt, manifest.prompt.image_placeholder)
    return bundle, *select_cases(wanted, bundle)


def check_source(checkpoint: Path, bundle: Path, manifest: Manifest, progress: Progress) -> None:
    """Checks that a bundle was made from this very checkpoint, by the digests of its files.

    Raises:
        CheckpointError: if there is no such folder.
        ParityError: if a file is missing or differs; all of them listed at once.
    """
    if not checkpoint.is_dir():
        msg = f"{checkpoint}: no such checkpoint; expected the folder that {bundle} was made from"
        raise CheckpointError(msg)
    entries = manifest.source.files
    faults = []
    progress.start("hashing the checkpoint", sum(entry.size for entry in entries))
    for entry in entries:
        fault = _source_fault(checkpoint, entry)
        faults += [fault] if fault else []
        progress.advance(entry.size)
    progress.finish()
    if faults:
        msg = (
            f"{bundle}: was not made from {checkpoint}: {'; '.join(faults)}; its manifest names "
            f"the checkpoint {manifest.source.name!r}; compare it with that one, or export "
            f"{checkpoint} again"
        )
        raise ParityError(msg)


def select_cases(
    cases: Sequence[Case], model: ComparedModel
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Splits cases into those that the bundle can be asked, and reasons against the others.

    A case cannot be asked if there is no room for an answer, or if the bundle's prompt form refuses
    it: some models take no text without a picture.

    Raises:
        ParityError: if there is none that can be asked.
    """
    kept, skipped = [], []
    for case in cases:
        try:
            length = len(model.encode(case))
        except InputError as error:
            skipped.append(f"case {case.name!r}: {error}")
            continue
        if length < model.max_length:
            kept.append(case)
        else:
            skipped.append(
                f"case {case.name!r}: {length} prompt tokens; max_length {model.max_length}"
            )
    if not kept:
        msg = (
            f"parity: no case can be asked: {'; '.join(skipped)}; give another --prompt or "
            "--image, or export with a larger --max-length"
        )
        raise ParityError(msg)
    return tuple(kept), tuple(skipped)


def make_report(
    options: ParityOptions,
    manifest: Manifest,
    cases: Sequence[CaseReport],
    *,
    backend: str,
    skipped: Sequence[str] = (),
) -> ParityReport:
    """Puts case reports together with what they were made with; `seconds` is left at zero."""
    precision = manifest.precision
    return ParityReport(
        schema_version=REPORT_SCHEMA_VERSION,
        verdict=worst_verdict(case.verdict for case in cases),
        checkpoint=str(options.checkpoint),
        bundle=str(options.bundle),
        family=manifest.family,
        variant=manifest.variant,
        precision=precision,
        backend=backend,
        versions=library_versions(),
        max_new_tokens=options.max_new_tokens,
        tolerances=tuple(row for row in TOLERANCES if row.precision == precision),
        error_bin_edges=ERROR_BIN_EDGES,
        cases=tuple(cases),
        skipped=tuple(skipped),
        seconds=0.0,
    )


def _source_fault(checkpoint: Path, entry: FileEntry) -> str | None:
    path = checkpoint / entry.path
    if not path.is_file():
        return f"{entry.path} is missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"{entry.path} has {size} bytes, the bundle's source had {entry.size}"
    digest = file_entry(checkpoint, path).sha256
    if digest != entry.sha256:
        return f"{entry.path} has sha256 {digest[:12]}..., the source had {entry.sha256[:12]}..."
    return None
