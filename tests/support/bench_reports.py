"""A measurement as a benchmark leaves it, with numbers that are easy to check."""

from __future__ import annotations

from vlmport.api.bench_points import DecodePoint, FirstTokenPoint, Measurement
from vlmport.api.bench_prompts import BenchPrompt
from vlmport.api.bench_report import (
    BENCH_SCHEMA_VERSION,
    Bandwidth,
    BenchReport,
    ContenderFigures,
    Environment,
    spread,
)
from vlmport.api.bench_tables import decode_figures, first_token_figures
from vlmport.api.bench_worker import NotRun
from vlmport.contract import Manifest

__all__ = ["DECODE", "FIRST", "made_measurement", "made_report"]

_PROMPT = BenchPrompt(1, "the picture", 16, 15, 9, (1,) * 24)
FIRST = FirstTokenPoint(1, 16, _PROMPT, "")
DECODE = DecodePoint(2, 24, 4, _PROMPT, "")
_LONG = DecodePoint(2, 9999, 4, None, "prompt: too long")


def made_measurement() -> Measurement:
    """The bundle takes 10 and 20 ms, PyTorch twice that; a third contender is absent."""
    measured = Measurement((FIRST, DECODE, _LONG), ("onnxruntime", "torch", "<absent>"))
    measured.refuse("<absent>", NotRun("no <GPU>"))
    measured.bandwidths = [1e9, 2e9]
    for point in (FIRST, DECODE):
        measured.seconds[point, "onnxruntime"] = [0.010, 0.020]
        measured.seconds[point, "torch"] = [0.020, 0.040]
    measured.host_seconds[DECODE, "onnxruntime"] = [0.001, 0.003]
    return measured


def made_report(manifest: Manifest) -> BenchReport:
    """The report of it."""
    measured = made_measurement()
    return BenchReport(
        schema_version=BENCH_SCHEMA_VERSION,
        bundle="bundle <b>",
        variant=manifest.variant,
        precision=manifest.precision_words,
        parameter_bytes={graph.name: graph.parameter_bytes for graph in manifest.graphs},
        rounds=2,
        environment=Environment(
            "Linux", "a CPU", 4, 2, 8 << 30, 0.1, "a GPU", "13.0", 16 << 30, {"python": "3.11"}
        ),
        bandwidth=Bandwidth("reading", spread(measured.bandwidths)),
        contenders=(
            ContenderFigures("onnxruntime", "onnxruntime, float32", 100 << 20, None, ""),
            ContenderFigures("torch", "torch eager", 300 << 20, 50 << 20, ""),
            ContenderFigures("<absent>", "", None, None, "no <GPU>"),
        ),
        first_token=first_token_figures(measured),
        decode=decode_figures(measured, manifest),
    )
