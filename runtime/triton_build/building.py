"""Builds the engines of a model repository, with the TensorRT and on the GPU that will run them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import vlmport
from vlmport.contract_engines import ENGINES_SCHEMA_VERSION, EngineSet
from vlmport.errors import EngineError
from vlmport.manifest import graphs_digest, load_manifest
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.builder import EngineBuilder
from vlmport.runtime.engines.profiles import check_options, graph_profiles
from vlmport.runtime.engines.progress import BuildWatch
from vlmport.runtime.engines.target import choose_target
from vlmport.runtime.triton_build.placing import engine_faults, place_engines
from vlmport.runtime.triton_build.step import load_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vlmport.contract import Manifest
    from vlmport.contract_engines import Engine, EngineProfile, TensorRTName
    from vlmport.runtime.engines.bindings import Bindings
    from vlmport.runtime.engines.target import Target
    from vlmport.runtime.triton_build.step import EngineStep, StepGraph

__all__ = ["LOG_NAME", "build_engines", "check_engines"]

LOG_NAME = "build.log"
_BUILD = "run build_engines.sh of the repository where the server runs"


@dataclass(frozen=True, slots=True, eq=False)
class _Build:
    """Everything that engines follow from."""

    home: Path
    manifest: Manifest
    step: EngineStep
    bindings: Bindings
    target: Target
    profiles: dict[str, tuple[EngineProfile, ...]]
    digests: dict[str, str]

    def faults(self) -> list[str]:
        """What keeps the engines that are there from serving."""
        version, capability = self.bindings.__version__, self.target.capability
        return engine_faults(self.home, self.step, version, capability, self.digests)


def build_engines(home: Path, backend: TensorRTName, tell: Callable[[str], None]) -> bool:
    """Builds every engine of a repository, unless those that are there serve here.

    Whatever fails leaves the old engines, or none.

    Args:
        home: the main model's version folder.
        backend: which TensorRT; Triton's own backend runs engines of "tensorrt" alone.
        tell: is told what is done.

    Returns:
        Whether anything was built.

    Raises:
        EngineError: if TensorRT or a GPU is missing, or a graph does not build.
    """
    build = _prepared(home, backend)
    name = f"{backend} {build.bindings.__version__} on {build.target.capability}"
    if not build.faults():
        tell(f"engines for {name} are there already")
        return False
    tell(f"building {len(build.step.graphs)} engines for {name}")
    with _workspace(home) as workspace:
        engines = _built(build, workspace, tell)
        place_engines(home, build.step, engines, workspace)
    return True


def check_engines(home: Path, backend: TensorRTName) -> None:
    """Refuses engines that this TensorRT and this GPU cannot run.

    Args:
        home: the main model's version folder.
        backend: which TensorRT.

    Raises:
        EngineError: says what is there in place of what is needed.
    """
    if faults := _prepared(home, backend).faults():
        msg = f"{'; '.join(faults)}; {_BUILD}"
        raise EngineError(msg)


def _prepared(home: Path, backend: TensorRTName) -> _Build:
    step = load_step(home).with_backend(backend)
    manifest = load_manifest(home / "bundle")
    check_options(manifest, step.options)
    bindings = load_bindings(backend)
    target = choose_target(bindings, step.options)
    profiles = {
        graph.graph: graph_profiles(manifest, graph.source(home), step.options)
        for graph in step.graphs
    }
    digests = {
        graph.graph: _digest(graph, profiles[graph.graph], step, bindings, target)
        for graph in step.graphs
    }
    return _Build(home, manifest, step, bindings, target, profiles, digests)


def _digest(
    graph: StepGraph,
    profiles: tuple[EngineProfile, ...],
    step: EngineStep,
    bindings: Bindings,
    target: Target,
) -> str:
    """Of everything that the engine follows from."""
    content = {
        "graph": graph.digest,
        "profiles": [asdict(profile) for profile in profiles],
        "options": asdict(step.options),
        "version": bindings.__version__,
        "capability": target.capability,
        "vlmport": vlmport.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _built(build: _Build, workspace: Path, tell: Callable[[str], None]) -> EngineSet:
    builder = EngineBuilder(build.bindings, build.step.options, build.target)
    engines: list[Engine] = []
    lines: list[str] = []
    for graph in build.step.graphs:
        engine, log = _interruptible(builder, build, graph, workspace)
        engines.append(replace(engine, source_sha256=build.digests[graph.graph]))
        lines += [f"{graph.graph}: built in {engine.build_seconds} s", *log]
        tell(f"  {graph.graph}: {engine.size / 1e6:.1f} MB, {engine.build_seconds:.1f} s")
    (workspace / LOG_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    backend, version = build.step.options.backend, build.bindings.__version__
    return EngineSet(
        schema_version=ENGINES_SCHEMA_VERSION,
        version=version,
        capability=build.target.capability,
        device=build.target.device,
        graphs_sha256=graphs_digest(build.manifest),
        options=build.step.options,
        engines=tuple(engines),
        tools={"vlmport": vlmport.__version__, backend: version},
    )


def _interruptible(
    builder: EngineBuilder, build: _Build, graph: StepGraph, workspace: Path
) -> tuple[Engine, list[str]]:
    """Builds one engine in a thread, so that an interrupt reaches this one and ends the build."""
    stop = threading.Event()
    watch = BuildWatch(lambda _: None, stop)
    source, profiles = graph.source(build.home), build.profiles[graph.graph]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(builder.build, source, profiles, workspace, watch)
        try:
            return future.result()
        except BaseException:
            stop.set()
            raise


@contextlib.contextmanager
def _workspace(home: Path) -> Iterator[Path]:
    """A temporary folder in the version's, where Triton looks for no models."""
    try:
        workspace = Path(tempfile.mkdtemp(prefix=".engines.", dir=home))
    except OSError as error:
        msg = f"{home}: cannot be written ({error.strerror}); the engines are written there"
        raise EngineError(msg) from error
    try:
        yield workspace
    except OSError as error:
        msg = f"{home}: engines cannot be written ({error.strerror}); free space and try again"
        raise EngineError(msg) from error
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
