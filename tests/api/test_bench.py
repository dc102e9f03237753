"""`vlmport bench` with real contenders; no time is asserted."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.html_page import Page
from support.trained import EXAMPLES, exported
from tiny.recipes import RECIPES

from vlmport.api.bench import BenchOptions, bench
from vlmport.api.bench_contenders import BundleContender, ContenderSpec
from vlmport.api.bench_device import CpuBandwidth, environment
from vlmport.api.bench_points import decode_points, first_token_points
from vlmport.api.bench_prompts import BenchPrompt, PromptMaker, bench_pictures
from vlmport.api.bench_report import BenchReport
from vlmport.api.bench_worker import NotRun, Worker, _Decode, peak_rss_bytes
from vlmport.api.progress import SilentProgress
from vlmport.backend_names import BackendName
from vlmport.errors import InputError, ParityError
from vlmport.machine.gpus import find_gpus
from vlmport.machine.requirements import requirements
from vlmport.manifest import load_manifest
from vlmport.runtime import VisionLanguageModel

RunCli = Callable[..., tuple[int, str, str]]

TINY = ("--batch", "2", "--context", "64", "--images", "1", "--prompt-tokens", "48")
QUICK = ("--new-tokens", "3", "--rounds", "1", "--threads", "1")


def spec(bundle: Path, name: str = "onnxruntime", **changes: object) -> ContenderSpec:
    fields: dict[str, object] = {"engines": None, "checkpoint": None, "precision": "float32"}
    fields |= {"name": name, "bundle": bundle, "on_gpu": False, "threads": 1} | changes
    return ContenderSpec(**fields)  # type: ignore[arg-type]


def options(bundle: Path, **changes: object) -> BenchOptions:
    fields: dict[str, object] = {
        "batches": (1, 2),
        "contexts": (64, 4000),
        "images": (0, 1),
        "prompt_tokens": (48,),
        "new_tokens": 3,
        "rounds": 2,
        "threads": 1,
        "read_bytes": 4 << 20,
        "settle_seconds": 0.0,
    }
    return BenchOptions(bundle, **(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def maker(trained_bundle: Path) -> PromptMaker:
    return PromptMaker(trained_bundle, load_manifest(trained_bundle))


@pytest.fixture(scope="module")
def report(trained_bundle: Path) -> BenchReport:
    changes = options(
        trained_bundle,
        against=("torch", "onnxruntime-cuda"),
        checkpoint=EXAMPLES / trained_bundle.name.removesuffix("-fp32"),
    )
    return bench(changes, SilentProgress())


def test_every_contender_is_measured_at_every_point(report: BenchReport) -> None:
    names = ["onnxruntime", "torch", "onnxruntime-cuda"]
    assert [one.name for one in report.contenders] == names
    assert len(report.first_token) == 2 * 3
    assert len(report.decode) == 4 * 3
    for first in report.first_token:
        measured = first.contender != "onnxruntime-cuda"
        assert (first.milliseconds is not None) == measured, first.reason
        assert bool(first.reason) != measured
    for decode in report.decode:
        measured = decode.contender != "onnxruntime-cuda" and decode.context_wanted == 64
        assert (decode.step_milliseconds is not None) == measured, decode.reason
        if decode.step_milliseconds is not None:
            assert len(decode.step_milliseconds.samples) == report.rounds == 2
            assert decode.tokens_per_second is not None
            assert decode.ratio is not None
            assert (decode.roofline_share is None) == (decode.contender == "torch")


def test_what_cannot_run_is_reported_with_the_reason(report: BenchReport) -> None:
    cuda = report.contenders[2]
    assert cuda.peak_rss_bytes is None
    assert "backend onnxruntime-cuda: missing on this machine" in cuda.reason
    reasons = {one.reason for one in report.decode if one.context_wanted == 4000}
    assert len(reasons) == 1
    assert "the bundle's max_length is 2048" in reasons.pop()


def test_a_contender_s_memory_is_its_own(report: BenchReport) -> None:
    ours, theirs = (one.peak_rss_bytes for one in report.contenders[:2])
    assert ours is not None
    assert theirs is not None
    # The libraries of PyTorch alone are larger than those of ONNX Runtime and this bundle; the
    # process of these tests holds both.
    assert sum(report.parameter_bytes.values()) < ours < theirs
    assert report.bandwidth.bytes_per_second.low > 0


def test_the_memory_of_a_new_process_does_not_begin_with_its_parent_s() -> None:
    held = np.ones(256 << 20, np.uint8)  # getrusage would report these 256 MiB for the child, too
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        child = pool.apply(peak_rss_bytes)
    own = peak_rss_bytes()
    assert own is not None
    assert child is not None
    assert held.nbytes < own
    assert child < own - held.nbytes // 2


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("wanted", [64, 300])
def test_a_prompt_has_the_wanted_length_or_a_little_less(
    trained_bundle: Path, maker: PromptMaker, num_images: int, wanted: int
) -> None:
    prompt = maker.make(num_images, wanted, 1)
    assert wanted - 3 <= prompt.text_tokens <= wanted
    model = VisionLanguageModel.load(trained_bundle, verify=False, threads=1)
    result = model.generate(prompt=prompt.text, images=bench_pictures(num_images), max_new_tokens=1)
    assert result.prompt_tokens == len(prompt.token_ids) == prompt.text_tokens + prompt.image_tokens
    assert result.image_tokens == prompt.image_tokens


def test_a_prompt_has_a_word_at_least(maker: PromptMaker) -> None:
    prompt = maker.make(0, 1, 1)
    assert prompt.text == "the"
    assert prompt.text_tokens > 1


def test_a_model_that_wants_a_picture_is_decoded_with_one(trained_bundle: Path) -> None:
    manifest = load_manifest(trained_bundle)
    refusal = "{% if messages[0]['content'] | length < 2 %}{{ raise_exception('none') }}{% endif %}"
    prompt = replace(manifest.prompt, chat_template=refusal + manifest.prompt.chat_template)
    maker = PromptMaker(trained_bundle, replace(manifest, prompt=prompt))
    assert (maker.least_images, maker.image_tokens(1)) == (1, 63)
    [refused] = first_token_points(maker, [0], [64])
    assert "chat template refuses" in refused.reason
    [point] = decode_points(maker, [200], [3], 4)
    assert point.prompt is not None
    assert point.prompt.num_images == 1
    assert 197 <= len(point.prompt.token_ids) <= 200
    model = VisionLanguageModel.load(trained_bundle, threads=1)
    timing = BundleContender(model).decode(point.prompt, batch=3, steps=4)
    assert len(timing.step_seconds) == 4


def test_a_prompt_leaves_room_for_the_answer(maker: PromptMaker) -> None:
    length = len(maker.make(0, 2000, 1).token_ids)
    maker.make(0, 2000, 2048 - length)
    with pytest.raises(InputError, match=f"{length} tokens and {2049 - length} new ones"):
        maker.make(0, 2000, 2049 - length)


def test_every_step_of_a_batch_is_timed(trained_bundle: Path, maker: PromptMaker) -> None:
    contender = BundleContender(VisionLanguageModel.load(trained_bundle, threads=1))
    timing = contender.decode(maker.make(0, 64, 9), batch=3, steps=8)
    assert len(timing.step_seconds) == 8
    assert all(step > 0 for step in timing.step_seconds)
    assert timing.host_seconds is None  # nothing is waited for on a CPU


class _Waiting:
    """A backend that tells how long it has waited: a second more at each look."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self._looks = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    @property
    def waited_seconds(self) -> float:
        self._looks += 1
        return -1.0 * self._looks


def test_host_time_is_the_step_without_the_wait(trained_bundle: Path, maker: PromptMaker) -> None:
    model = VisionLanguageModel.load(trained_bundle, threads=1)
    model._backend = _Waiting(model._backend)  # type: ignore[assignment]
    contender = BundleContender(model)
    timing = contender.decode(maker.make(0, 64, 5), batch=2, steps=4)
    assert timing.host_seconds is not None
    pairs = zip(timing.step_seconds, timing.host_seconds, strict=True)
    waits = [step - host for step, host in pairs]
    assert waits == pytest.approx([-2.0] * 4)  # one look a row


def test_a_worker_that_dies_is_told_of(trained_bundle: Path, maker: PromptMaker) -> None:
    worker = Worker(spec(trained_bundle))
    try:
        worker._process.kill()
        answer = worker.first_token(maker.make(0, 64, 1))
        assert isinstance(answer, NotRun)
        assert "its process ended (killed" in answer.reason
    finally:
        worker.close()


def test_a_worker_outlives_what_it_cannot_do(trained_bundle: Path, maker: PromptMaker) -> None:
    worker = Worker(spec(trained_bundle))
    try:
        answer = worker.first_token(BenchPrompt(1, "<image>" * 3, 1, 1, 0, ()))
        assert isinstance(answer, NotRun)
        assert "found 3 places for images" in answer.reason
        assert isinstance(worker.first_token(maker.make(0, 64, 1)), float)
        assert (worker.memory().peak_rss_bytes or 0) > 0
        # Interrupted: nobody takes the answer any more, and the process ends without a word.
        worker._connection.send(_Decode(maker.make(0, 64, 20), 2, 20))
    finally:
        worker.close()
    assert worker._process.exitcode == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backend": "onnxruntim"}, "did you mean onnxruntime"),
        ({"backend": "torch"}, "contender 'torch': unknown"),
        ({"against": ("onnxruntime",)}, "found a contender twice"),
        ({"against": ("torch",)}, "found no checkpoint"),
        ({"against": ("cuda",)}, "contender 'cuda': unknown"),
        ({"batches": (0,)}, "--batch: found 0"),
        ({"contexts": ()}, "--context: found nothing"),
        ({"images": (-1,)}, "--images: found -1"),
        ({"rounds": 0}, "--rounds: found 0; expected 1 or more"),
        ({"threads": 0}, "--threads: found 0"),
        ({"checkpoint": Path("model")}, "found model, which PyTorch alone needs"),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BenchOptions(Path("bundle"), **fields)  # type: ignore[arg-type]


def test_pytorch_must_have_what_the_bundle_was_made_from(trained_bundle: Path) -> None:
    other = options(trained_bundle, against=("torch",), checkpoint=EXAMPLES / "fuyu")
    with pytest.raises(ParityError, match="was not made from"):
        bench(other, SilentProgress())


def test_reading_takes_longer_than_nothing() -> None:
    probe = CpuBandwidth(8 << 20, threads=2)
    rates = [probe.measure() for _ in range(3)]
    assert 1e8 < statistics.median(rates) < 1e13
    assert "8 MiB with 2 threads" in probe.method


def test_the_environment_names_the_machine() -> None:
    found = environment(3)
    assert found.threads == 3
    assert found.cores >= 1
    assert found.memory_bytes > 1 << 28
    assert {"vlmport", "python", "numpy"} <= found.versions.keys()


def test_the_command_prints_and_writes(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    files = ("--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    code, out, err = run_cli("bench", trained_bundle, *TINY, *QUICK, *files)
    assert code == 0, err
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [one["batch"] for one in written["decode"]] == [2]
    assert "first token" in out
    assert "roofline" in out
    assert Page((tmp_path / "a.html").read_text(encoding="utf-8")).tags.count("svg") == 2


def test_a_gpu_backend_without_a_gpu_is_one_clear_error(
    run_cli: RunCli, trained_bundle: Path
) -> None:
    if not find_gpus().fault:
        pytest.skip("this machine has a GPU; without one the command would be refused")
    for backend in ("tensorrt-rtx", "onnxruntime-cuda"):
        code, out, err = run_cli("bench", trained_bundle, "--backend", backend, *TINY, *QUICK)
        assert (code, out) == (1, "")
        assert f"backend {backend}: missing on this machine" in err
        assert "CUDA GPU" in err


def test_the_command_wants_numbers(run_cli: RunCli, trained_bundle: Path) -> None:
    assert run_cli("bench", trained_bundle, "--batch", "1,x")[0] == 2
    code, _, err = run_cli("bench", "missing")
    assert (code, "missing" in err) == (1, True)


@pytest.mark.slow
def test_the_decode_step_of_torch_is_compiled(trained_bundle: Path) -> None:
    checkpoint = EXAMPLES / trained_bundle.name.removesuffix("-fp32")
    changes = options(
        trained_bundle,
        against=("torch-compile",),
        checkpoint=checkpoint,
        batches=(1,),
        contexts=(64,),
        images=(0,),
        rounds=1,
    )
    found = bench(changes, SilentProgress())
    compiled = found.decode[1]
    assert compiled.contender == "torch-compile"
    # Where there is no compiler for it, it is named and not dropped.
    assert (compiled.step_milliseconds is None) == bool(compiled.reason)
    print(compiled.reason or f"{compiled.step_milliseconds}")
    assert "the decode step alone is compiled" in found.first_token[1].reason


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_torch_answers_and_decodes_for_every_family(name: str) -> None:
    from vlmport.api.bench_torch import TorchContender

    bundle = exported(name)
    maker = PromptMaker(bundle, load_manifest(bundle))
    contender = TorchContender(spec(bundle, "torch", checkpoint=EXAMPLES / name))
    assert contender.first_token(maker.make(1, 48, 1)) > 0
    timing = contender.decode(maker.make(maker.least_images, 48, 4), batch=2, steps=3)
    assert len(timing.step_seconds) == 3


@pytest.mark.gpu
@pytest.mark.skipif(bool(find_gpus().fault), reason="no GPU: every GPU backend would be timed")
@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"])
def test_a_gpu_backend_is_timed(trained_bundle: Path, tmp_path: Path, backend: BackendName) -> None:
    from vlmport.api.build import build
    from vlmport.api.build_options import build_options

    missing = [need.name for need in requirements(backend) if not need.is_met]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: {backend} would be timed")
    engines = None
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        wanted = build_options(load_manifest(trained_bundle), backend, max_length=256)
        engines = build(trained_bundle, wanted, SilentProgress(), tmp_path / "e").folder
    changes = options(trained_bundle, backend=backend, engines=engines, contexts=(64,))
    found = bench(changes, SilentProgress())
    reasons = [one.reason for one in found.decode] + [one.reason for one in found.first_token]
    assert set(reasons) == {""}
    assert (found.contenders[0].device_bytes or 0) > sum(found.parameter_bytes.values()) // 2
    assert found.environment.gpu
    if engines is not None:
        assert all(one.host_milliseconds is not None for one in found.decode)
