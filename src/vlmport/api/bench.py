"""`vlmport bench`: how fast is a bundle, beside PyTorch and beside other backends?

Contenders are measured in turn, point by point and round by round, so that whatever the machine
does beside falls on all of them alike.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.bench_contenders import TORCH_CONTENDERS, ContenderSpec, is_on_gpu
from vlmport.api.bench_device import bandwidth_probe, environment, usable_cores
from vlmport.api.bench_points import decode_points, first_token_points
from vlmport.api.bench_prompts import PromptMaker
from vlmport.api.bench_report import BENCH_SCHEMA_VERSION, Bandwidth, BenchReport, spread
from vlmport.api.bench_rounds import measure_in_turn
from vlmport.api.bench_tables import contender_figures, decode_figures, first_token_figures
from vlmport.api.bench_worker import NotRun, Worker
from vlmport.api.parity import check_source
from vlmport.backend_names import BACKENDS, DEFAULT_BACKEND
from vlmport.errors import InputError, close_matches
from vlmport.machine.requirements import require_backend
from vlmport.manifest import load_manifest, verify_files

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.api.bench_points import Point
    from vlmport.api.progress import Progress
    from vlmport.contract import Manifest

__all__ = ["BenchOptions", "bench"]

_READ_BYTES = 512 << 20
_SETTLE_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured.

    Attributes:
        bundle: folder.
        backend: that runs it.
        engines: folder of the engines; None for those of the bundle that fit.
        against: backends, "torch" and "torch-compile".
        checkpoint: folder; PyTorch needs it.
        batches: rows that are decoded together.
        contexts: tokens of the prompts after which decoding is timed.
        images: pictures of the prompts whose first token is timed.
        prompt_tokens: text tokens of these prompts.
        new_tokens: decode steps that are timed in each round.
        rounds: how often every point is measured.
        threads: on the CPU, of each contender; None for the cores that this process may use.
        read_bytes: that the memory's speed is measured with.
        settle_seconds: pause before each measurement: the worker threads of some libraries spin
            for a while after their work and would take the next contender's cores.
    """

    bundle: Path
    backend: str = DEFAULT_BACKEND
    engines: Path | None = None
    against: tuple[str, ...] = ()
    checkpoint: Path | None = None
    batches: tuple[int, ...] = (1, 4, 8)
    contexts: tuple[int, ...] = (128, 1024)
    images: tuple[int, ...] = (0, 1)
    prompt_tokens: tuple[int, ...] = (64, 512)
    new_tokens: int = 32
    rounds: int = 5
    threads: int | None = None
    read_bytes: int = _READ_BYTES
    settle_seconds: float = _SETTLE_SECONDS

    def __post_init__(self) -> None:
        """Checks what can be checked without the bundle."""
        known = (*BACKENDS, *TORCH_CONTENDERS)
        for name in (self.backend, *self.against):
            if name not in known or (name == self.backend and name in TORCH_CONTENDERS):
                wanted = BACKENDS if name == self.backend else known
                msg = f"contender {name!r}: unknown; {close_matches(name, wanted)}"
                raise InputError(msg)
        contenders = (self.backend, *self.against)
        if len(set(contenders)) < len(contenders):
            msg = f"--against: found a contender twice ({', '.join(contenders)}); name each once"
            raise InputError(msg)
        if self.checkpoint is None and set(self.against) & set(TORCH_CONTENDERS):
            msg = "--against torch: found no checkpoint; give the bundle's source with --checkpoint"
            raise InputError(msg)
        if self.checkpoint is not None and not set(self.against) & set(TORCH_CONTENDERS):
            msg = (
                f"--checkpoint: found {self.checkpoint}, which PyTorch alone needs; add --against "
                "torch, or leave it out"
            )
            raise InputError(msg)
        self._check_numbers()

    def _check_numbers(self) -> None:
        counts = {
            "--batch": self.batches,
            "--context": self.contexts,
            "--prompt-tokens": self.prompt_tokens,
            "--new-tokens": (self.new_tokens,),
            "--rounds": (self.rounds,),
            "--threads": (1 if self.threads is None else self.threads,),
            "--images": self.images,
        }
        for option, values in counts.items():
            least = 0 if option == "--images" else 1
            if not values or min(values) < least:
                found = ", ".join(map(str, values)) or "nothing"
                raise InputError(f"{option}: found {found}; expected {least} or more")


def bench(options: BenchOptions, progress: Progress) -> BenchReport:
    """Measures a bundle and those that it is compared with.

    Raises:
        BundleError: if the bundle cannot be opened.
        CheckpointError: if there is no such checkpoint.
        ParityError: if the bundle was made from another checkpoint.
        VlmportError: if the bundle cannot run on the backend that was asked for. Whatever else
            cannot run is in the report, with the reason.
    """
    manifest = load_manifest(options.bundle)
    require_backend(options.backend, options.bundle, options.engines)
    verify_files(options.bundle, manifest, hashes=True)
    if options.checkpoint is not None:
        check_source(options.checkpoint, options.bundle, manifest, progress)
    threads = options.threads or usable_cores()
    maker = PromptMaker(options.bundle, manifest)
    points: tuple[Point, ...] = (
        *first_token_points(maker, options.images, options.prompt_tokens),
        *decode_points(maker, options.contexts, options.batches, options.new_tokens),
    )
    machine = environment(threads)
    with contextlib.ExitStack() as stack:
        workers = _open(options, manifest, threads, stack, progress)
        probe = bandwidth_probe(options.read_bytes, threads, on_gpu=is_on_gpu(options.backend))
        measured = measure_in_turn(
            points, workers, probe, options.rounds, options.settle_seconds, progress
        )
        memory = {
            name: worker if isinstance(worker, NotRun) else (worker.computes, worker.memory())
            for name, worker in workers.items()
        }
    return BenchReport(
        schema_version=BENCH_SCHEMA_VERSION,
        bundle=options.bundle.resolve().name,
        variant=manifest.variant,
        precision=manifest.precision_words,
        parameter_bytes={graph.name: graph.parameter_bytes for graph in manifest.graphs},
        rounds=options.rounds,
        environment=machine,
        bandwidth=Bandwidth(probe.method, spread(measured.bandwidths)),
        contenders=contender_figures(memory),
        first_token=first_token_figures(measured),
        decode=decode_figures(measured, manifest),
    )


def _open(
    options: BenchOptions,
    manifest: Manifest,
    threads: int,
    stack: contextlib.ExitStack,
    progress: Progress,
) -> dict[str, Worker | NotRun]:
    on_gpu = is_on_gpu(options.backend)
    workers: dict[str, Worker | NotRun] = {}
    for name in (options.backend, *options.against):
        progress.start(f"opening {name}")
        spec = ContenderSpec(
            name=name,
            bundle=options.bundle,
            engines=options.engines if name == options.backend else None,
            checkpoint=options.checkpoint,
            precision=manifest.precision,
            on_gpu=on_gpu if name in TORCH_CONTENDERS else is_on_gpu(name),
            threads=threads,
        )
        try:
            worker = Worker(spec)
        except InputError as error:
            if name == options.backend:
                raise
            workers[name] = NotRun(str(error))
        else:
            stack.callback(worker.close)
            workers[name] = worker
        progress.finish()
    return workers
