"""Judges a quantized bundle: what is wrong with its inputs, its graphs and its next tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.api.quantized_report import QuantizedFinding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.api.builtin_cases import Case
    from vlmport.api.layer_comparison import LayerTable
    from vlmport.api.parity_model import ComparedModel
    from vlmport.api.quantized_report import BundleFigures, GraphSignal
    from vlmport.api.signal_noise import Signal
    from vlmport.api.tolerances import QuantizedTolerance
    from vlmport.export.reference import Reference

__all__ = ["findings_of", "input_findings", "layer_findings"]


def input_findings(
    reference: Reference,
    bundle: ComparedModel,
    case: Case,
    ours: NDArray[np.int64],
    theirs: NDArray[np.int64],
) -> list[QuantizedFinding]:
    """What no quantizer may change: prompt tokens, and the bits of preprocessed pictures.

    Args:
        reference: the PyTorch model.
        bundle: the opened bundle.
        case: what is asked.
        ours: int64 [prompt_length], the bundle's prompt.
        theirs: int64 [prompt_length], PyTorch's.
    """
    findings = []
    if not np.array_equal(ours, theirs):
        message = (
            f"prompt, case {case.name!r}: {len(ours)} tokens; PyTorch has {len(theirs)} or others"
        )
        findings.append(QuantizedFinding("prompt_tokens", message))
    for image, rgb in zip(case.images, case.rgb_images(), strict=True):
        arrays, expected = bundle.image_inputs(image), reference.image_inputs(rgb)
        for name in sorted({*arrays, *expected}):
            fault = _difference(arrays.get(name), expected.get(name))
            if fault:
                message = f"preprocessing, case {case.name!r}, {name}: {fault}; expected none"
                findings.append(QuantizedFinding("preprocessing", message))
    return findings


# Rounding to 4 bits was measured to leave the median gain of every layer within 3 % of 1; moved
# scales differ from channel to channel by more than the spread.
_MOST_GAIN = 1.33
_MOST_SPREAD = 1.5


def findings_of(
    figures: BundleFigures, tolerances: Sequence[QuantizedTolerance]
) -> list[QuantizedFinding]:
    """Holds a bundle's figures against the rows of the table for its format."""
    limits = {row.quantity: row for row in tolerances}
    findings = [
        finding
        for graph in figures.graphs
        for finding in _graph_findings(graph, limits["image_graph_snr"])
    ]
    agreement = figures.agreement
    subject = f"next tokens, {agreement.steps} of {agreement.questions} answers"
    kl, top1 = limits["kl_mean"], limits["top1_agreement"]
    if agreement.kl_mean is None:
        fault = f"{agreement.nonfinite_steps} have NaN or Inf among their logits"
        findings.append(QuantizedFinding("kl_mean", f"{subject}: {fault}; expected finite ones"))
    elif agreement.kl_mean > kl.limit:
        fault = f"mean KL {agreement.kl_mean:.3g} nats; tolerance {kl.limit:g} ({kl.format})"
        findings.append(QuantizedFinding("kl_mean", f"{subject}: {fault}"))
    logits = limits["logits_snr"]
    if agreement.logits_snr_db is not None and agreement.logits_snr_db < logits.limit:
        fault = (
            f"signal-to-noise ratio of the logits {agreement.logits_snr_db:.1f} dB; tolerance "
            f"{logits.limit:g} dB ({logits.format})"
        )
        findings.append(QuantizedFinding("logits_snr", f"{subject}: {fault}"))
    if agreement.top1_agreement < top1.limit:
        fault = (
            f"{agreement.top1_agreement:.1%} have PyTorch's likeliest token; "
            f"tolerance {top1.limit:.0%} ({top1.format})"
        )
        findings.append(QuantizedFinding("top1_agreement", f"{subject}: {fault}"))
    return findings


def layer_findings(
    table: LayerTable, tolerances: Sequence[QuantizedTolerance]
) -> list[QuantizedFinding]:
    """Holds layers against the float bundle's; one finding a graph, for its first faulty layer.

    Differences pass from layer to layer, so that the first faulty one is where to look.
    """
    row = next(row for row in tolerances if row.quantity == "layer_snr")
    findings = []
    for graph in dict.fromkeys(layer.graph for layer in table.layers):
        layers = [layer for layer in table.layers if layer.graph == graph]
        faulty = [(layer, _layer_fault(layer.signal, row)) for layer in layers]
        faults = [(layer, fault) for layer, fault in faulty if fault]
        if faults:
            layer, fault = faults[0]
            more = f" (and {len(faults) - 1} of {len(layers)} more)" if len(faults) > 1 else ""
            message = f"{graph}, {layer.layer}: {fault}{more}"
            findings.append(QuantizedFinding("layer_snr", message))
    return findings


def _layer_fault(signal: Signal, row: QuantizedTolerance) -> str | None:
    if signal.nonfinite:
        return f"{signal.nonfinite} values are NaN or Inf; expected finite ones"
    if _has_wrong_scale(signal):
        return (
            f"its channels are {signal.gain:.3g} times those of the float bundle, all alike; "
            "expected 1: a scale is wrong"
        )
    if signal.gain_free_snr_db is not None and signal.gain_free_snr_db < row.limit:
        return (
            f"signal-to-noise ratio {signal.gain_free_snr_db:.1f} dB without gains; tolerance "
            f"{row.limit:g} dB ({row.format})"
        )
    return None


def _has_wrong_scale(signal: Signal) -> bool:
    """Whether all channels have one and the same gain that is not 1.

    A quantizer that moves scales into the next layer gives each channel another one.
    """
    if signal.gain is None or signal.gain_spread is None:
        return signal.gain is not None and signal.gain <= 0
    off = max(signal.gain, 1.0 / signal.gain) if signal.gain > 0 else float("inf")
    return off > _MOST_GAIN and signal.gain_spread < _MOST_SPREAD


def _graph_findings(graph: GraphSignal, row: QuantizedTolerance) -> list[QuantizedFinding]:
    signal, subject = graph.signal, f"{graph.graph}, {graph.output}"
    if signal.nonfinite:
        message = f"{subject}: {signal.nonfinite} values are NaN or Inf; expected finite ones"
        return [QuantizedFinding("image_graph_snr", message)]
    if signal.snr_db is not None and signal.snr_db < row.limit:
        message = (
            f"{subject}: signal-to-noise ratio {signal.snr_db:.1f} dB; tolerance {row.limit:g} dB "
            f"({row.format})"
        )
        return [QuantizedFinding("image_graph_snr", message)]
    return []


def _difference(ours: NDArray[Any] | None, theirs: NDArray[Any] | None) -> str | None:
    if ours is None or theirs is None:
        return f"only {'PyTorch' if ours is None else 'the bundle'} has it"
    if ours.shape != theirs.shape:
        return f"shape {list(ours.shape)}; PyTorch has {list(theirs.shape)}"
    if np.array_equal(ours, theirs):
        return None
    return f"max_abs {np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max():.3g}"
