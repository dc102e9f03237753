"""Builds the TensorRT engines of a bundle."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.api.build_plan import check_folder, engines_folder, plan_engines, reusable_engines
from vlmport.api.bundle_folder import new_bundle
from vlmport.api.linked_bundle import link_file
from vlmport.api.versions import library_versions
from vlmport.contract_engines import ENGINES_FOLDER, ENGINES_SCHEMA_VERSION, EngineSet
from vlmport.engine_manifest import load_engine_set, save_engine_set
from vlmport.errors import EngineError
from vlmport.manifest import graphs_digest, load_manifest, verify_files
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.builder import EngineBuilder
from vlmport.runtime.engines.profiles import check_options
from vlmport.runtime.engines.progress import PERCENT, BuildWatch
from vlmport.runtime.engines.target import choose_target
from vlmport.runtime.engines.timing_cache import IGNORED, TimingCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlmport.api.build_plan import EnginePlan
    from vlmport.api.progress import Progress
    from vlmport.contract_engines import BuildOptions, Engine

__all__ = ["LOG_NAME", "BuildReport", "build"]

LOG_NAME = "build.log"


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was built.

    Attributes:
        folder: of engine.json and the engines.
        engines: what engine.json says.
        reused: graphs whose engines were there already.
        remarks: what the user asked for and does nothing.
        seconds: the whole took.
    """

    folder: Path
    engines: EngineSet
    reused: tuple[str, ...]
    remarks: tuple[str, ...]
    seconds: float


def build(
    bundle: Path,
    options: BuildOptions,
    progress: Progress,
    output: Path | None = None,
    *,
    timing_cache: Path | None = None,
    jobs: int = 1,
) -> BuildReport:
    """Builds an engine for each graph of a bundle and for choosing the next token.

    Engines that follow from the same graph, weights, options and TensorRT are taken over.
    Everything is written into a temporary folder, which takes its name at the very end; whatever
    fails or is interrupted leaves nothing behind.

    Args:
        bundle: its folder.
        options: of `build_options`.
        progress: is told of the builds.
        output: the folder to write; None for one below the bundle that says what it holds.
        timing_cache: file with measurements of earlier builds, which is written too.
        jobs: engines that are built at the same time, each with its weights in memory.

    Raises:
        BundleError: if the bundle is missing or damaged.
        EngineError: if the options are out of range, TensorRT is not installed, a graph does not
            build, or its engine would not compute what the graph means.
    """
    started = time.monotonic()
    if jobs < 1:
        msg = f"jobs: found {jobs}; expected 1 or more"
        raise EngineError(msg)
    manifest = load_manifest(bundle)
    check_options(manifest, options)
    bindings = load_bindings(options.backend)
    target = choose_target(bindings, options)
    version = bindings.__version__
    folder = output or engines_folder(bundle, options, version, target.capability)
    check_folder(folder)
    progress.start("checking the bundle")
    verify_files(bundle, manifest, hashes=True)
    plans = plan_engines(bundle, manifest, options, version, target.capability)
    reused = reusable_engines(folder, plans)
    remarks, cache = _timing_cache(options, timing_cache)
    graphs_sha256 = graphs_digest(manifest)
    if len(reused) == len(plans):
        known = load_engine_set(folder)
        if (known.options, known.graphs_sha256) == (options, graphs_sha256):
            progress.finish()
            return BuildReport(folder, known, tuple(reused), remarks, time.monotonic() - started)
    builder = EngineBuilder(bindings, options, target, cache)
    work = _Work(builder, folder, reused, progress, jobs)
    with _new_folder(folder) as workspace:
        engines = EngineSet(
            schema_version=ENGINES_SCHEMA_VERSION,
            version=version,
            capability=target.capability,
            device=target.device,
            graphs_sha256=graphs_sha256,
            options=options,
            engines=tuple(work.run(plans, workspace)),
            tools={**library_versions(), options.backend: version},
        )
        save_engine_set(workspace, engines)
    progress.finish()
    return BuildReport(folder, engines, tuple(reused), remarks, time.monotonic() - started)


def _timing_cache(
    options: BuildOptions, path: Path | None
) -> tuple[tuple[str, ...], TimingCache | None]:
    if path is None:
        return (), None
    if options.backend == "tensorrt-rtx":
        return (f"{path}: {IGNORED}",), None
    return (), TimingCache(path)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """`new_bundle`, which also takes the folder of all engines away again if it made it."""
    parent = folder.parent
    is_ours = parent.name == ENGINES_FOLDER and not parent.exists()
    try:
        with new_bundle(folder, error=EngineError) as workspace:
            yield workspace
    except BaseException:
        if is_ours:
            with contextlib.suppress(OSError):  # it may not exist, or not be empty
                parent.rmdir()
        raise


class _Work:
    """Builds or takes over one engine after the other, or several at a time."""

    def __init__(
        self,
        builder: EngineBuilder,
        old: Path,
        reused: dict[str, Engine],
        progress: Progress,
        jobs: int,
    ) -> None:
        self._builder = builder
        self._old = old
        self._reused = reused
        self._progress = progress
        self._jobs = jobs
        self._stop = threading.Event()

    def run(self, plans: Sequence[EnginePlan], folder: Path) -> list[Engine]:
        """The engines, in the order of the plans, with their files and build.log in `folder`.

        Builds run in threads: TensorRT gives Python's lock back while it builds, so that an
        interrupt reaches this one, which tells the others to stop.
        """
        new = [plan for plan in plans if plan.source.graph not in self._reused]
        if self._jobs > 1 and new:
            self._progress.start(f"building {len(new)} engines", PERCENT * len(new))
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [pool.submit(self._engine, plan, folder) for plan in plans]
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()  # raises what failed first, not what was stopped for it
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        results = [future.result() for future in futures]
        lines = [line for _, log in results for line in log]
        (folder / LOG_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [engine for engine, _ in results]

    def _engine(self, plan: EnginePlan, folder: Path) -> tuple[Engine, list[str]]:
        graph = plan.source.graph
        if (known := self._reused.get(graph)) is not None:
            link_file(self._old / known.file, folder / known.file)
            return known, [f"{graph}: unchanged, taken over"]
        if self._jobs == 1:
            self._progress.start(f"building {graph}", PERCENT)
        watch = BuildWatch(self._progress.advance, self._stop)
        engine, log = self._builder.build(plan.source, plan.profiles, folder, watch)
        heading = f"{graph}: built in {engine.build_seconds} s"
        return replace(engine, source_sha256=plan.source_sha256), [heading, *log]
