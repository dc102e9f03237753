"""Measures bundles of true shapes with random weights on a GPU, against the goals of issue 5.

For each shape a synthetic checkpoint is written, exported in float16, quantized, built into
engines and timed with `vlmport bench`'s own functions: against PyTorch eager and compiled, each
quantized bundle against the float16 one, decoding against the memory's bandwidth and prefill
against the peak of a matrix product, all measured in the same run. Prints one JSON object.

    python scripts/bench_gpu.py --folder build/bench-gpu --backend tensorrt
    python scripts/bench_gpu.py --folder build/bench-gpu --tiny --backend onnxruntime
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from benching import environment
from rich.console import Console
from synthetic import LLAVA_8B, TINY_LLAVA, TINYLLAVA_3B, Shapes, write_checkpoint

from vlmport.api.bench import BenchOptions, bench
from vlmport.api.bench_contenders import ContenderSpec, is_on_gpu
from vlmport.api.bench_device import bandwidth_probe, usable_cores
from vlmport.api.bench_points import decode_points
from vlmport.api.bench_prompts import PromptMaker
from vlmport.api.bench_render import print_bench
from vlmport.api.bench_report import ratios
from vlmport.api.bench_rounds import measure_in_turn
from vlmport.api.bench_worker import NotRun, Worker
from vlmport.api.build import build
from vlmport.api.build_options import build_options
from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.api.quantize import QuantizeOptions, quantize
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.backend_names import BACKENDS
from vlmport.calibration.recipe import ActivationMethod, WeightMethod
from vlmport.errors import InputError
from vlmport.manifest import load_manifest

if TYPE_CHECKING:
    from vlmport.api.bench_report import BenchReport
    from vlmport.contract import Manifest
    from vlmport.contract_engines import TensorRTName

_SHAPES = {"3b": TINYLLAVA_3B, "8b": LLAVA_8B}
_QUANTIZED: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
_MOST_IMAGE_TOKENS = 1024  # of one picture and the chat around it
_FLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class _Run:
    """What is measured of each shape.

    Attributes:
        context: tokens before decoding begins.
        prompt: text tokens of the prompt for the prefill.
        new_tokens: decode steps of a round.
        rounds: of each measurement.
        matrix: side of the product that the peak is measured with.
        read_bytes: that the bandwidth is measured with.
    """

    context: int
    prompt: int
    new_tokens: int
    rounds: int
    matrix: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class _Goal:
    """A figure of issue 5.

    Attributes:
        name: what is measured.
        value: what was measured; None if it was not.
        wanted: the least (or most) that meets the goal.
        reason: why it was not measured; "" if the report says it.
        is_limit: whether less is better.
    """

    name: str
    value: float | None
    wanted: float
    reason: str = ""
    is_limit: bool = False

    @property
    def is_met(self) -> bool:
        """Whether it is; what was not measured is not met."""
        if self.value is None:
            return False
        return self.value <= self.wanted if self.is_limit else self.value >= self.wanted


_TRUE = _Run(1024, 1024, 64, 7, 8192, 1 << 30)
_TINY = _Run(96, 96, 4, 2, 256, 8 << 20)


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-gpu"))
    parser.add_argument("--backend", choices=BACKENDS, default="tensorrt")
    parser.add_argument("--shapes", nargs="*", choices=sorted(_SHAPES), default=sorted(_SHAPES))
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script out")
    parser.add_argument("--without-torch", action="store_true", help="leave PyTorch out")
    options = parser.parse_args()
    shapes = {"tiny": TINY_LLAVA} if options.tiny else {n: _SHAPES[n] for n in options.shapes}
    run = _TINY if options.tiny else _TRUE
    report: dict[str, object] = {"environment": environment(), "backend": options.backend}
    for name, shape in shapes.items():
        folder = options.folder / name
        report[name] = _measure(folder, shape, run, options.backend, not options.without_torch)
    print(json.dumps(report, indent=2))


def _measure(
    folder: Path, shape: Shapes, run: _Run, backend: str, with_torch: bool
) -> dict[str, object]:
    checkpoint, fp16 = folder / "checkpoint", folder / "fp16"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, shape, "float16")
    export(ExportOptions(checkpoint, fp16, precision="fp16", overwrite=True), SilentProgress())
    bundles = {"fp16": fp16} | {name: _quantized(fp16, folder / name, name) for name in _QUANTIZED}
    for bundle in bundles.values():
        _build_engines(bundle, backend, run)
    whole = bench(
        BenchOptions(
            bundle=fp16,
            backend=backend,
            against=("torch", "torch-compile") if with_torch else (),
            checkpoint=checkpoint if with_torch else None,
            batches=(1,),
            contexts=(run.context,),
            images=(0, 1),
            prompt_tokens=(run.prompt,),
            new_tokens=run.new_tokens,
            rounds=run.rounds,
            read_bytes=run.read_bytes,
        ),
        SilentProgress(),
    )
    print_bench(whole, Console(stderr=True, width=140))
    peak = _matmul_peak(run, is_on_gpu(backend))
    goals = _goals(whole, load_manifest(fp16), peak) + _speedups(bundles, backend, run)
    return {
        "bench": dataclasses.asdict(whole),
        "matmul_tflops": round(peak / 1e12, 3),
        "goals": [dataclasses.asdict(goal) | {"is_met": goal.is_met} for goal in goals],
    }


def _quantized(source: Path, target: Path, name: Literal["int8", "int4"]) -> Path:
    # Random weights say nothing about accuracy: the quick ways of rounding and observing will do.
    recipe = RecipeOptions(
        name,
        weights=WeightMethod("nearest"),
        activations=ActivationMethod("min_max", smoothing=None),
    )
    quantize(
        QuantizeOptions(source, target, recipe, max_samples=1, overwrite=True), SilentProgress()
    )
    return target


def _build_engines(bundle: Path, backend: str, run: _Run) -> None:
    if backend in ("tensorrt", "tensorrt-rtx"):
        name = cast("TensorRTName", backend)
        length = max(run.context + run.new_tokens + 1, run.prompt + _MOST_IMAGE_TOKENS)
        options = build_options(load_manifest(bundle), name, max_batch=1, max_length=length)
        build(bundle, options, SilentProgress())


def _goals(report: BenchReport, manifest: Manifest, peak: float) -> list[_Goal]:
    """Those of issue 5 that a float16 bundle and PyTorch answer."""
    decode = {one.contender: one for one in report.decode}
    ours = decode[report.contenders[0].name]
    share = None if ours.roofline_share is None else ours.roofline_share.median
    host = None if ours.host_milliseconds is None else ours.host_milliseconds.median
    goals = [
        _Goal("decode, share of the bandwidth roofline", share, 0.8),
        _Goal("host time of a decode step, ms", host, 0.1, is_limit=True),
        _Goal("prefill, share of the matmul peak", _prefill_share(report, manifest, peak), 0.5),
    ]
    for name, wanted in (("torch", 2.0), ("torch-compile", 1.2)):
        ratio = decode[name].ratio if name in decode else None
        value = None if ratio is None else ratio.median
        goals.append(_Goal(f"decode, times {name}", value, wanted))
    return goals


def _prefill_share(report: BenchReport, manifest: Manifest, peak: float) -> float | None:
    """Of the first token of a prompt without pictures: what is not the decoder counts as waste."""
    [ours] = [
        one
        for one in report.first_token
        if one.contender == report.contenders[0].name and not one.images
    ]
    if ours.milliseconds is None:
        return None
    return _prefill_flops(manifest, ours.text_tokens) / (ours.milliseconds.median / 1e3) / peak


def _prefill_flops(manifest: Manifest, tokens: int) -> float:
    """Of the decoder: its matrices for every token, the head for the last one, causal attention."""
    sizes, layout = manifest.dimensions, manifest.kv_layout
    head = sizes.vocab_size * sizes.hidden_size
    layers = manifest.graph("decoder").parameter_bytes / _FLOAT16_BYTES - head
    # Scores and their product with the values; half of them are masked. The synthetic models'
    # heads together are as wide as an embedding.
    attention = 2 * layout.num_layers * sizes.hidden_size * tokens * tokens
    return 2 * layers * tokens + 2 * head + attention


def _matmul_peak(run: _Run, on_gpu: bool) -> float:
    """FLOP/s of a product of two square matrices, the median of the rounds.

    In float16 on a GPU; in float32 on a CPU, where PyTorch's float16 is far from the peak.
    """
    device = "cuda" if on_gpu else "cpu"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; the matmul peak is measured with it")
    dtype = torch.float16 if on_gpu else torch.float32
    matrix = torch.ones(run.matrix, run.matrix, dtype=dtype, device=device)
    times = []
    for _ in range(run.rounds + 2):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the GPU
        times.append(time.perf_counter() - started)
    return 2 * run.matrix**3 / statistics.median(times[2:])


def _speedups(bundles: dict[str, Path], backend: str, run: _Run) -> list[_Goal]:
    """Each quantized bundle against the float16 one, in turn."""
    manifest = load_manifest(bundles["fp16"])
    maker = PromptMaker(bundles["fp16"], manifest)
    points = tuple(decode_points(maker, [run.context], [1], run.new_tokens))
    threads = usable_cores()
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker | NotRun] = {}
        for name, bundle in bundles.items():
            spec = ContenderSpec(
                backend, bundle, None, None, "float16", is_on_gpu(backend), threads
            )
            try:
                workers[name] = worker = Worker(spec)
            except InputError as error:  # the other bundles still have figures
                workers[name] = NotRun(str(error))
            else:
                stack.callback(worker.close)
        probe = bandwidth_probe(run.read_bytes, threads, on_gpu=is_on_gpu(backend))
        measured = measure_in_turn(points, workers, probe, run.rounds, 0.3, SilentProgress())
    [point] = points
    float16 = measured.seconds.get((point, "fp16"))
    goals = []
    for name in _QUANTIZED:
        taken = measured.seconds.get((point, name))
        value = ratios(float16, taken).median if float16 and taken else None
        reason = measured.reasons.get((point, name), "")
        goals.append(_Goal(f"decode of {name}, times float16", value, 1.6, reason))
    return goals


if __name__ == "__main__":
    main()
