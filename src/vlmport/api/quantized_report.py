"""What a parity run on a quantized bundle found: frozen values, written as JSON, text and HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from vlmport.api.agreement import Agreement, AnswerAgreement
from vlmport.api.layer_comparison import LayerTable
from vlmport.api.signal_noise import Signal
from vlmport.api.tolerances import QuantizedTolerance

__all__ = [
    "BundleFigures",
    "GraphSignal",
    "QuantizedFinding",
    "QuantizedReport",
    "quantized_report_from_json",
    "quantized_report_json",
]

QUANTIZED_REPORT_SCHEMA_VERSION = 1

QuantizedCheck = Literal[
    "preprocessing",
    "prompt_tokens",
    "image_graph_snr",
    "kl_mean",
    "logits_snr",
    "top1_agreement",
    "layer_snr",
]


@dataclass(frozen=True, slots=True)
class QuantizedFinding:
    """One reason why the verdict is FAIL.

    Attributes:
        check: what was being checked.
        message: names the graph or the case, the value found and its tolerance.
    """

    check: QuantizedCheck
    message: str


@dataclass(frozen=True, slots=True)
class GraphSignal:
    """The output of a graph before the decoder, beside PyTorch's on the same input.

    Attributes:
        graph: its name.
        output: name of the output.
        signal: over all pictures; PyTorch is the reference.
    """

    graph: str
    output: str
    signal: Signal


@dataclass(frozen=True, slots=True)
class BundleFigures:
    """One bundle beside PyTorch in float32.

    Attributes:
        bundle: its folder.
        bytes: of all its files.
        graphs: those before the decoder.
        agreement: of its next tokens with PyTorch's, along PyTorch's own answers.
    """

    bundle: str
    bytes: int
    graphs: tuple[GraphSignal, ...]
    agreement: Agreement


@dataclass(frozen=True, slots=True)
class QuantizedReport:
    """All that a parity run on a quantized bundle found.

    Attributes:
        schema_version: version of this structure.
        verdict: FAIL if there is any finding.
        checkpoint: folder of the PyTorch model, which ran in float32.
        bundle: folder of the bundle.
        family: the bundle's family.
        variant: the bundle's parts.
        quantization: what was asked for when it was made ("int8").
        formats: graph -> format -> number of layers.
        backend: what computed the bundle.
        versions: tool name -> version, of this run.
        max_new_tokens: most tokens of an answer.
        tolerances: the rows of the table that were used.
        quantized: the bundle's figures.
        float_bundle: those of the bundle that it was made from, if that was given.
        answers: question by question, of the quantized bundle.
        layers: layer by layer beside the float bundle, if that was given.
        findings: all that is not as it should be.
        skipped: built-in cases that the bundle has no room for, each with its reason.
        seconds: how long the run took, loading included.
    """

    schema_version: int
    verdict: Literal["PASS", "FAIL"]
    checkpoint: str
    bundle: str
    family: str
    variant: str
    quantization: str
    formats: dict[str, dict[str, int]]
    backend: str
    versions: dict[str, str]
    max_new_tokens: int
    tolerances: tuple[QuantizedTolerance, ...]
    quantized: BundleFigures
    float_bundle: BundleFigures | None
    answers: tuple[AnswerAgreement, ...]
    layers: LayerTable | None
    findings: tuple[QuantizedFinding, ...]
    skipped: tuple[str, ...]
    seconds: float


_REPORT = TypeAdapter(QuantizedReport)


def quantized_report_json(report: QuantizedReport) -> str:
    """The whole report as one JSON object."""
    return _REPORT.dump_json(report, indent=2).decode() + "\n"


def quantized_report_from_json(content: str | bytes) -> QuantizedReport:
    """Reads what `quantized_report_json` wrote.

    Raises:
        pydantic.ValidationError: if it is not a report of this version.
    """
    return _REPORT.validate_json(content)
