"""Does a bundle with integer weights still answer as the PyTorch model of its checkpoint does?"""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.api.agreement import sum_agreement
from vlmport.api.parity import check_source, open_cases
from vlmport.api.quantized_report import (
    QUANTIZED_REPORT_SCHEMA_VERSION,
    BundleFigures,
    QuantizedReport,
)
from vlmport.api.quantized_verdict import findings_of, layer_findings
from vlmport.api.tolerances import quantized_tolerances
from vlmport.api.versions import library_versions
from vlmport.errors import InputError, ParityError
from vlmport.machine.requirements import require_backend
from vlmport.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlmport.api.agreement import AnswerAgreement
    from vlmport.api.builtin_cases import Case
    from vlmport.api.layer_comparison import LayerTable
    from vlmport.api.parity import ParityOptions
    from vlmport.api.parity_bundle import OpenedBundle
    from vlmport.api.progress import Progress
    from vlmport.api.quantized_report import QuantizedFinding
    from vlmport.api.reference_answers import GreedyAnswer
    from vlmport.contract import Manifest
    from vlmport.export.reference import Reference

__all__ = ["has_integer_layers", "quantized_parity"]


def has_integer_layers(bundle: Path) -> bool:
    """Whether a bundle is to be compared by `quantized_parity`.

    Raises:
        BundleError: if there is no bundle, or its manifest is damaged.
    """
    quantization = load_manifest(bundle).quantization
    return quantization is not None and quantization.has_integer_layers


def quantized_parity(options: ParityOptions, progress: Progress) -> QuantizedReport:
    """Compares a bundle that has integer weights with PyTorch in float32.

    Rounding weights changes every number, so single numbers are not held against tolerances. What
    is judged: preprocessing and prompt tokens must be equal; each graph before the decoder must
    keep a signal-to-noise ratio on PyTorch's input; and along PyTorch's own greedy answers the
    distributions of the next token must stay close.

    Args:
        options: what to compare; `against` adds the float bundle's figures and the comparison layer
            by layer.
        progress: is told of each question.

    Raises:
        ParityError: if a bundle was made from another checkpoint, the bundle of `against` is
            quantized itself, or there is no case to ask.
        InputError: if an image or an option cannot be used.
        BundleError: if a bundle cannot be opened.
        CheckpointError: if the checkpoint cannot be opened.
        ExportError: if the family file cannot be used.
    """
    from vlmport.export.family import load_reference

    started = time.perf_counter()
    if options.max_new_tokens < 1:
        msg = f"max_new_tokens: found {options.max_new_tokens}; expected 1 or more"
        raise InputError(msg)
    manifest = load_manifest(options.bundle)
    # Told before the checkpoint is hashed, which takes minutes if it is large.
    require_backend(options.backend, options.bundle, options.engines)
    check_source(options.checkpoint, options.bundle, manifest, progress)
    if options.against is not None:
        _check_against(options.against, options.bundle, manifest)
    bundle, cases, skipped = open_cases(options, manifest, progress)
    progress.start("loading the PyTorch model")
    where = (options.family_file, manifest.source.prompt_template or None)
    reference = load_reference(options.checkpoint, "float32", *where)
    progress.finish()
    with _asked(reference, bundle, cases, options.max_new_tokens, progress) as asked:
        answers, findings = asked
        led, figures = _figures(options.bundle, bundle, reference, cases, answers, progress)
        beside, layers = _beside(options, reference, cases, answers, progress)
    report = _report(options, manifest, figures, led, findings, layers)
    return replace(
        report,
        backend=bundle.backend,
        float_bundle=beside,
        skipped=skipped,
        seconds=time.perf_counter() - started,
    )


def _check_against(against: Path, bundle: Path, manifest: Manifest) -> None:
    float_manifest = load_manifest(against)
    if has_integer_layers(against):
        msg = f"{against}: has integer weights itself; --against takes the bundle that it came from"
        raise ParityError(msg)
    if float_manifest.source.files != manifest.source.files:
        names = float_manifest.source.name, manifest.source.name
        msg = (
            f"{against}: was made from the checkpoint {names[0]!r}, {bundle} from other files "
            f"({names[1]!r}); give the bundle that it was quantized from"
        )
        raise ParityError(msg)


@contextmanager
def _asked(
    reference: Reference,
    bundle: OpenedBundle,
    cases: Sequence[Case],
    max_new_tokens: int,
    progress: Progress,
) -> Iterator[tuple[list[GreedyAnswer], list[QuantizedFinding]]]:
    """PyTorch's answers, their logits in a folder that lasts as long as the block."""
    from vlmport.api.quantized_verdict import input_findings
    from vlmport.api.reference_answers import keep_answer
    from vlmport.runtime import Request
    from vlmport.runtime.messages import parse_messages

    progress.start("asking PyTorch", len(cases))
    with tempfile.TemporaryDirectory(prefix="vlmport.") as folder:
        answers, findings = [], []
        for case in cases:
            prompt = bundle.encode(case)
            limit = min(max_new_tokens, bundle.max_length - len(prompt))
            answer = reference.greedy(case.messages, case.rgb_images(), limit)
            findings += input_findings(reference, bundle, case, prompt, answer.prompt_ids)
            request = Request(
                messages=parse_messages(case.messages), images=case.images, max_new_tokens=limit
            )
            tokens = [int(token) for token in answer.token_ids]
            answers.append(
                keep_answer(Path(folder), case.name, request, tokens, answer.logits, answer.text)
            )
            progress.advance(1)
        progress.finish()
        yield answers, findings


def _figures(
    folder: Path,
    bundle: OpenedBundle,
    reference: Reference,
    cases: Sequence[Case],
    answers: Sequence[GreedyAnswer],
    progress: Progress,
) -> tuple[tuple[AnswerAgreement, ...], BundleFigures]:
    from vlmport.api.quantized_graphs import graph_signals
    from vlmport.api.reference_answers import measure_answers

    graphs = graph_signals(reference, bundle, cases, progress)
    led = measure_answers(answers, bundle.model, progress)
    size = sum(entry.size for entry in bundle.model.manifest.files)
    return led, BundleFigures(str(folder), size, graphs, sum_agreement(led))


def _beside(
    options: ParityOptions,
    reference: Reference,
    cases: Sequence[Case],
    answers: Sequence[GreedyAnswer],
    progress: Progress,
) -> tuple[BundleFigures | None, LayerTable | None]:
    """The float bundle's figures, and the comparison layer by layer."""
    from vlmport.api.layer_comparison import compare_layers
    from vlmport.api.parity_bundle import open_bundle

    if options.against is None:
        return None, None
    float_bundle = open_bundle(options.against)
    _, figures = _figures(options.against, float_bundle, reference, cases, answers, progress)
    layers = compare_layers(options.against, options.bundle, float_bundle.model, answers, progress)
    return figures, layers


def _report(
    options: ParityOptions,
    manifest: Manifest,
    figures: BundleFigures,
    led: tuple[AnswerAgreement, ...],
    findings: Sequence[QuantizedFinding],
    layers: LayerTable | None,
) -> QuantizedReport:
    """The report without what is known only outside of the comparison."""
    quantization = manifest.quantization
    assert quantization is not None
    formats = {name for graph in quantization.graphs for name, n in graph.layers.items() if n}
    tolerances = quantized_tolerances(formats)
    found = (*findings, *findings_of(figures, tolerances))
    if layers is not None:
        found = (*found, *layer_findings(layers, tolerances))
    return QuantizedReport(
        schema_version=QUANTIZED_REPORT_SCHEMA_VERSION,
        verdict="FAIL" if found else "PASS",
        checkpoint=str(options.checkpoint),
        bundle=str(options.bundle),
        family=manifest.family,
        variant=manifest.variant,
        quantization=quantization.name,
        formats={graph.graph: dict(graph.layers) for graph in quantization.graphs},
        backend="",
        versions=library_versions(),
        max_new_tokens=options.max_new_tokens,
        tolerances=tolerances,
        quantized=figures,
        float_bundle=None,
        answers=led,
        layers=layers,
        findings=found,
        skipped=(),
        seconds=0.0,
    )
