"""From samples to figures, tables, plots and JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from support.bench_reports import DECODE, FIRST, made_measurement, made_report
from support.html_page import Page

from vlmport.api.bench_contenders import DecodeTiming
from vlmport.api.bench_html import bench_html
from vlmport.api.bench_points import Measurement
from vlmport.api.bench_prompts import BenchPrompt
from vlmport.api.bench_render import print_bench
from vlmport.api.bench_report import bench_json, ratios, spread
from vlmport.api.bench_svg import Curve, curve_plot
from vlmport.api.bench_tables import decode_bytes, decode_figures, first_token_figures
from vlmport.api.bench_worker import NotRun
from vlmport.contract import Manifest


class ScriptedWorker:
    """Answers as it is told to."""

    def __init__(self, *answers: float | DecodeTiming | NotRun) -> None:
        self._answers = list(answers)

    def first_token(self, prompt: BenchPrompt) -> float | NotRun:
        answer = self._answers.pop(0)
        assert isinstance(answer, (float, NotRun))
        return answer

    def decode(self, prompt: BenchPrompt, batch: int, steps: int) -> DecodeTiming | NotRun:
        assert (batch, steps) == (DECODE.batch, DECODE.steps)
        answer = self._answers.pop(0)
        assert isinstance(answer, (DecodeTiming, NotRun))
        return answer


def test_ratios_pair_what_was_measured_in_the_same_round() -> None:
    # The medians' ratio would be 2 as well, but not its spread.
    found = ratios([2.0, 40.0, 6.0], [1.0, 10.0, 3.0])
    assert found == spread([2.0, 4.0, 2.0])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 4.0)


def test_bytes_of_a_step_are_weights_cache_and_embeddings(sample_manifest: Manifest) -> None:
    a_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, float32
    weights = sample_manifest.graph("decoder").parameter_bytes
    embedding = 64 * 4
    # One step after 10 tokens reads the cache of 11, one of which it has written.
    one = decode_bytes(sample_manifest, batch=1, context=10, steps=1)
    assert one == weights + a_token * (11 + 1) + embedding
    assert decode_bytes(sample_manifest, 1, 10, 3) == one + a_token  # on average one more
    assert decode_bytes(sample_manifest, 5, 10, 1) == weights + 5 * (one - weights)


def test_a_step_is_held_against_the_bandwidth_of_its_round(sample_manifest: Manifest) -> None:
    ours, theirs, absent, *_ = decode_figures(made_measurement(), sample_manifest)
    moved = decode_bytes(sample_manifest, DECODE.batch, 24, DECODE.steps)
    assert ours.bytes_per_step == moved
    assert ours.roofline_share == spread([moved / 0.010 / 1e9, moved / 0.020 / 2e9])
    assert ours.tokens_per_second == spread([2 / 0.010, 2 / 0.020])
    assert ours.host_milliseconds == spread([1.0, 3.0])
    assert theirs.ratio == spread([2.0, 2.0])
    assert (theirs.bytes_per_step, theirs.roofline_share) == (None, None)
    assert (absent.step_milliseconds, absent.ratio, absent.reason) == (None, None, "no <GPU>")


def test_a_contender_on_another_device_has_no_share(sample_manifest: Manifest) -> None:
    measured = Measurement((DECODE,), ("onnxruntime", "onnxruntime-cuda"), bandwidths=[1e9])
    measured.seconds = {(DECODE, name): [0.01] for name in measured.contenders}
    ours, theirs = decode_figures(measured, sample_manifest)
    assert ours.roofline_share is not None
    assert theirs.roofline_share is None
    assert theirs.bytes_per_step == ours.bytes_per_step


def test_every_point_and_contender_has_a_row(sample_manifest: Manifest) -> None:
    measured = made_measurement()
    first, decode = first_token_figures(measured), decode_figures(measured, sample_manifest)
    assert [one.contender for one in first] == ["onnxruntime", "torch", "<absent>"]
    assert len(decode) == 6
    assert [one.reason for one in decode[3:]] == ["prompt: too long"] * 3
    assert first[0].milliseconds == spread([10.0, 20.0])
    assert (first[0].text_tokens, first[0].image_tokens) == (15, 9)


def test_the_sample_of_a_round_is_its_median_step() -> None:
    measured = Measurement((DECODE,), ("a",))
    worker = ScriptedWorker(DecodeTiming((9.0, 1.0, 2.0), (0.5, 0.1, 0.2)))
    measured.measure(DECODE, "a", worker)  # type: ignore[arg-type]
    assert measured.seconds[DECODE, "a"] == [2.0]
    assert measured.host_seconds[DECODE, "a"] == [0.2]


def test_who_fails_in_a_later_round_has_no_figures() -> None:
    measured = Measurement((FIRST,), ("a",))
    worker = ScriptedWorker(1.0, 2.0, NotRun("out of memory"), 3.0)
    measured.warm_up(FIRST, "a", worker)  # type: ignore[arg-type]
    for _ in range(3):
        measured.measure(FIRST, "a", worker)  # type: ignore[arg-type]
    assert (FIRST, "a") not in measured.seconds
    assert measured.reasons[FIRST, "a"] == "out of memory"
    assert worker.first_token(FIRST.prompt) == 3.0  # type: ignore[arg-type]  # not asked again


def test_the_tables_name_what_was_not_run(sample_manifest: Manifest) -> None:
    stream = io.StringIO()
    print_bench(made_report(sample_manifest), Console(file=stream, width=140))
    shown = stream.getvalue()
    assert "2.00 (2.00 to 2.00)" in shown  # times the bundle's
    assert "150 (100 to 200)" in shown  # tokens/s
    assert "not run: <absent>: no <GPU>" in shown
    assert shown.count("no <GPU>") == 1
    assert "decoding of torch at batch 2 and context 9999" in shown
    assert "host ms a step" in shown
    assert "a CPU, 4 cores, 2 threads" in shown


def test_the_page_is_one_file_whose_texts_are_escaped(sample_manifest: Manifest) -> None:
    content = bench_html(made_report(sample_manifest))
    page = Page(content)
    assert not {"script", "link", "img", "b"} & set(page.tags)
    assert "://" not in content
    assert page.tags.count("svg") == 2  # one number of images, one context that was measured
    assert "not run: no <GPU>" in page.text
    assert "bundle <b>" in page.text
    assert "Decoding at context 24, tokens/s" in page.text


def test_json_has_every_sample(sample_manifest: Manifest) -> None:
    written = json.loads(bench_json(made_report(sample_manifest)))
    assert written["schema_version"] == 1
    assert written["decode"][1]["step_milliseconds"]["samples"] == [20.0, 40.0]
    assert written["environment"]["gpu"] == "a GPU"
    assert written["bandwidth"]["bytes_per_second"]["median"] == 1.5e9


@pytest.mark.parametrize("lengths", [(64,), (1, 8), (128, 1024, 2048)])
def test_a_plot_has_a_point_for_each_length(lengths: tuple[int, ...]) -> None:
    points = tuple((length, spread([float(length), 2.0 * length])) for length in lengths)
    plot = curve_plot([Curve("a & b", points, "c0")], title="t", x_axis="tokens")
    page = Page(plot)
    assert page.tags.count("circle") == len(lengths)
    assert all(str(length) in page.text for length in lengths)
    xs = [float(value) for name, value in page.attributes if name == "cx"]
    assert xs == sorted(xs)
    assert all(0 < x < 560 for x in xs)
