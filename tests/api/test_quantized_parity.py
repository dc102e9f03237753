from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.hand_quantized import quantize_by_hand

from vlmport.api.parity import ParityOptions, parity
from vlmport.api.progress import SilentProgress
from vlmport.api.quantized_html import quantized_report_html
from vlmport.api.quantized_parity import quantized_parity
from vlmport.api.quantized_report import (
    QuantizedReport,
    quantized_report_from_json,
    quantized_report_json,
)
from vlmport.errors import ParityError

RunCli = Callable[..., tuple[int, str, str]]
CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tinyllava"
DOUBLED = "language_model.model.layers.0.mlp.gate_proj+up_proj"


@pytest.fixture(scope="module")
def quantized(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_by_hand(trained_bundle, tmp_path_factory.mktemp("hand") / "int8")


@pytest.fixture(scope="module")
def report(quantized: Path, trained_bundle: Path) -> QuantizedReport:
    options = ParityOptions(CHECKPOINT, quantized, against=trained_bundle)
    return quantized_parity(options, SilentProgress())


def test_a_right_bundle_passes(report: QuantizedReport) -> None:
    assert report.verdict == "PASS"
    assert report.findings == ()
    assert report.float_bundle is not None
    ours, theirs = report.quantized.agreement, report.float_bundle.agreement
    assert theirs.kl_mean is not None
    assert ours.kl_mean is not None
    assert theirs.kl_mean < 1e-9 < ours.kl_mean
    assert ours.steps == theirs.steps == sum(len(answer.steps) for answer in report.answers)
    assert report.quantized.bytes < report.float_bundle.bytes / 2
    assert {graph.graph for graph in report.quantized.graphs} == {"vision_encoder", "projector"}
    assert report.layers is not None
    assert len(report.layers.layers) == 36


def test_the_report_survives_json(report: QuantizedReport) -> None:
    assert quantized_report_from_json(quantized_report_json(report)) == report


def test_the_page_shows_every_layer_and_answer(report: QuantizedReport) -> None:
    content = quantized_report_html(report)
    assert "://" not in content
    assert "<script" not in content
    assert report.layers is not None
    assert all(layer.layer in content for layer in report.layers.layers)
    assert all(answer.reference_text in content for answer in report.answers)
    assert content.count("<svg") == 4  # divergence, and three graphs


def test_a_doubled_scale_fails_on_the_command_line(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    bad = quantize_by_hand(trained_bundle, tmp_path / "bad", faults={DOUBLED: 2.0})
    files = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ("--against", trained_bundle, "--json", files[0], "--html", files[1])
    code, out, _ = run_cli("parity", CHECKPOINT, bad, *arguments)
    assert code == 1
    assert "a scale is wrong" in out
    assert "signal-to-noise ratio of the logits" in out
    assert "FAIL" in out
    found = quantized_report_from_json(files[0].read_bytes())
    assert found.verdict == "FAIL"
    assert {"kl_mean", "logits_snr", "layer_snr"} <= {one.check for one in found.findings}
    assert "a scale is wrong" in files[1].read_text(encoding="utf-8")


def test_a_quantized_bundle_is_not_held_to_float_tolerances(quantized: Path) -> None:
    with pytest.raises(ParityError, match="its layers have integer weights"):
        parity(ParityOptions(CHECKPOINT, quantized), SilentProgress())


def test_against_is_for_quantized_bundles(
    run_cli: RunCli, trained_bundle: Path, quantized: Path
) -> None:
    code, _, error = run_cli("parity", CHECKPOINT, trained_bundle, "--against", trained_bundle)
    assert code == 1
    assert "which has no integer weights" in error
    code, _, error = run_cli("parity", CHECKPOINT, quantized, "--against", quantized)
    assert code == 1
    assert "has integer weights itself" in error
