"""What a parity run found: frozen values that are written as JSON, shown as text and as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from vlmport.api.tolerances import Tolerance

__all__ = [
    "REPORT_SCHEMA_VERSION",
    "BatchCheck",
    "CaseReport",
    "CheckName",
    "Comparison",
    "Finding",
    "Fork",
    "ParityReport",
    "QuantityCheck",
    "RoundingCheck",
    "StepCheck",
    "Verdict",
    "report_from_json",
    "report_json",
    "worst_verdict",
]

REPORT_SCHEMA_VERSION = 2

Verdict = Literal["PASS", "NEAR_TIE", "FAIL"]
CheckName = Literal[
    "preprocessing",
    "prompt_tokens",
    "vision_encoder",
    "projector",
    "embed_tokens",
    "logits",
    "greedy_tokens",
    "batch",
]
_SEVERITY: dict[Verdict, int] = {"PASS": 0, "NEAR_TIE": 1, "FAIL": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason why a verdict is not PASS.

    Attributes:
        verdict: how bad it is.
        check: what was being checked.
        message: names the graph, the case, the step, the value found and its tolerance.
    """

    verdict: Verdict
    check: CheckName
    message: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arrays beside each other; numbers are None where they would have no meaning.

    Attributes:
        shape: of the bundle's array.
        reference_shape: of PyTorch's array.
        max_abs: largest |bundle - PyTorch|; 0.0 for empty arrays.
        mean_abs: mean |bundle - PyTorch|; 0.0 for empty arrays.
        cosine: of the flattened arrays; 1.0 if both are all zeros, 0.0 if one is; None if empty.
        reference_max_abs: largest |PyTorch|.
        reference_mean_abs: mean |PyTorch|.
        nonfinite: how many NaN and Inf the bundle's array holds.
        reference_nonfinite: how many PyTorch's holds.
    """

    shape: tuple[int, ...]
    reference_shape: tuple[int, ...]
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    reference_max_abs: float | None
    reference_mean_abs: float | None
    nonfinite: int
    reference_nonfinite: int


@dataclass(frozen=True, slots=True)
class QuantityCheck:
    """The output of one stage before the decoder.

    Attributes:
        quantity: "preprocessing" or the name of a graph.
        comparison: bundle and PyTorch on the same input, which is PyTorch's.
        end_to_end: each side fed with its own outputs from the picture on; reported, and judged
            only for NaN, Inf and shape, as the logits judge what errors add up to. None where it
            would be the same as `comparison`.
        max_abs_limit: largest max_abs that passes; None if it follows from a missing number.
        mean_abs_limit: largest mean_abs that passes, None if it is not limited.
        verdict: PASS or FAIL.
    """

    quantity: CheckName
    comparison: Comparison
    end_to_end: Comparison | None
    max_abs_limit: float | None
    mean_abs_limit: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RoundingCheck:
    """How far half precision takes the bundle and PyTorch from PyTorch in float32.

    Attributes:
        quantity: name of a graph, or "logits": the steps that are comparable, as one array.
        bundle: the bundle beside PyTorch in float32, on the same input.
        pytorch: PyTorch in the bundle's precision beside PyTorch in float32, on the same input.
    """

    quantity: CheckName
    bundle: Comparison
    pytorch: Comparison


@dataclass(frozen=True, slots=True)
class StepCheck:
    """The decoder's logits of one generated step, computed after the same tokens on both sides.

    Attributes:
        step: from 0.
        token_id: chosen by the bundle.
        reference_token_id: chosen by PyTorch.
        comparison: of the logits [vocab_size].
        argmax_equal: whether the largest logit is the same token; None if not comparable.
        gap: difference of PyTorch's two largest logits; None if there are no two finite ones.
    """

    step: int
    token_id: int
    reference_token_id: int
    comparison: Comparison
    argmax_equal: bool | None
    gap: float | None


@dataclass(frozen=True, slots=True)
class Fork:
    """The first step at which two answers have different tokens.

    Attributes:
        step: from 0.
        token_id: what the answer under test has.
        reference_token_id: what the answer that it is compared with has.
        gap: the reference's logit of its own token minus that of the other one; None if unknown.
        margin: widest gap that counts as a near tie.
        is_near_tie: whether the gap is within the margin and the logits within their tolerance.
    """

    step: int
    token_id: int
    reference_token_id: int
    gap: float | None
    margin: float
    is_near_tie: bool


@dataclass(frozen=True, slots=True)
class BatchCheck:
    """A case's answer within a batch of all cases, compared with its answer alone.

    Attributes:
        token_ids: generated in the batch.
        max_abs: largest difference of the logits to those alone; None if nothing was comparable.
        fork: where the tokens part, or None.
        verdict: of this comparison.
    """

    token_ids: tuple[int, ...]
    max_abs: float | None
    fork: Fork | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class CaseReport:
    """One chat, asked on both sides.

    Attributes:
        name: of the case.
        prompt: text of the chat, without images.
        images: each image in words.
        prompt_tokens: text and image tokens of the prompt, as the bundle counts them.
        prompt_tokens_equal: whether both sides made the same text tokens of the prompt.
        checks: the stages before the decoder that this case uses.
        steps: logits of the steps that are comparable.
        steps_not_compared: steps after a fork or after the shorter answer.
        fork: where the answers part, or None.
        token_ids: the bundle's answer.
        reference_token_ids: PyTorch's answer.
        text: the bundle's answer.
        reference_text: PyTorch's answer.
        error_counts: how many logits of all steps differ by how much; see `error_bin_edges`.
        logits_limit: largest max_abs of a step's logits that passes; None if it is not known.
        rounding: one for each stage and the logits; none where the bundle computes in float32.
        float32_token_ids: PyTorch's answer in float32; empty where the bundle computes in it.
        batch: None if there was no batch.
        findings: all that is not PASS, the batch's included.
        verdict: the worst of the findings.
    """

    name: str
    prompt: str
    images: tuple[str, ...]
    prompt_tokens: int
    prompt_tokens_equal: bool
    checks: tuple[QuantityCheck, ...]
    steps: tuple[StepCheck, ...]
    steps_not_compared: int
    fork: Fork | None
    token_ids: tuple[int, ...]
    reference_token_ids: tuple[int, ...]
    text: str
    reference_text: str
    error_counts: tuple[int, ...]
    logits_limit: float | None
    rounding: tuple[RoundingCheck, ...]
    float32_token_ids: tuple[int, ...]
    batch: BatchCheck | None
    findings: tuple[Finding, ...]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All that a parity run found.

    Attributes:
        schema_version: version of this structure.
        verdict: the worst of all cases.
        checkpoint: folder of the PyTorch model.
        bundle: folder of the bundle.
        family: the bundle's family.
        variant: the bundle's parts.
        precision: element type of the bundle's computation.
        backend: what computed the bundle.
        versions: tool name -> version, of this run.
        max_new_tokens: most tokens of an answer.
        tolerances: the rows of the table that were used.
        error_bin_edges: bounds of the bins of `error_counts`: bin i holds errors of at least
            edge i - 1 and below edge i; the first bin starts at zero, the last has no end.
        cases: in the order in which they ran.
        skipped: built-in cases that the bundle has no room for, each with its reason.
        seconds: how long the run took, loading included.
    """

    schema_version: int
    verdict: Verdict
    checkpoint: str
    bundle: str
    family: str
    variant: str
    precision: str
    backend: str
    versions: dict[str, str]
    max_new_tokens: int
    tolerances: tuple[Tolerance, ...]
    error_bin_edges: tuple[float, ...]
    cases: tuple[CaseReport, ...]
    skipped: tuple[str, ...]
    seconds: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that is not PASS, in the order of the cases."""
        return tuple(finding for case in self.cases for finding in case.findings)


_REPORT = TypeAdapter(ParityReport)


def report_json(report: ParityReport) -> str:
    """The whole report as one JSON object."""
    return _REPORT.dump_json(report, indent=2).decode() + "\n"


def report_from_json(content: str | bytes) -> ParityReport:
    """Reads what `report_json` wrote.

    Raises:
        pydantic.ValidationError: if it is not a report of this version.
    """
    return _REPORT.validate_json(content)


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL before NEAR_TIE before PASS; PASS if there are none."""
    worst: Verdict = "PASS"
    for verdict in verdicts:
        if _SEVERITY[verdict] > _SEVERITY[worst]:
            worst = verdict
    return worst
