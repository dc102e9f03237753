"""Which engines a bundle needs, and which of those that are there serve again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import vlmport
from vlmport.contract_engines import ENGINES_FOLDER, ENGINES_NAME
from vlmport.engine_manifest import read_engine_set
from vlmport.errors import EngineError
from vlmport.graphs.engine_source import engine_source, selection_sources
from vlmport.manifest import file_entry
from vlmport.runtime.engines.profiles import graph_profiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.contract import Manifest
    from vlmport.contract_engines import BuildOptions, Engine, EngineProfile, EngineSource

__all__ = ["EnginePlan", "check_folder", "engines_folder", "plan_engines", "reusable_engines"]


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine that a bundle needs.

    Attributes:
        source: the graph.
        profiles: in the order of their indices.
        source_sha256: of everything that the engine follows from.
    """

    source: EngineSource
    profiles: tuple[EngineProfile, ...]
    source_sha256: str


def engines_folder(bundle: Path, options: BuildOptions, version: str, capability: str) -> Path:
    """Where engines lie if nobody says another place; those of other versions lie beside it."""
    return bundle / ENGINES_FOLDER / f"{options.backend}-{version}-{capability}"


def check_folder(folder: Path) -> None:
    """Refuses a place that holds anything but engines, before any work is done.

    Raises:
        EngineError: says what is there.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / ENGINES_NAME).is_file()):
        msg = (
            f"{folder}: holds no engines (no {ENGINES_NAME}), so that it is not replaced; delete "
            "it or choose another place"
        )
        raise EngineError(msg)


def plan_engines(
    bundle: Path, manifest: Manifest, options: BuildOptions, version: str, capability: str
) -> list[EnginePlan]:
    """One engine for each graph, and those that choose the next token.

    Args:
        bundle: its files were verified.
        manifest: of the bundle.
        options: checked.
        version: of TensorRT.
        capability: of `Target`.

    Raises:
        EngineError: if a graph has an axis of which no range is known.
        GraphError: if a graph is not of the form that engines need.
    """
    sources = [
        engine_source(bundle / graph.file, graph.name, options.max_length)
        for graph in manifest.graphs
    ]
    sources += selection_sources(bundle, manifest.dimensions.vocab_size)
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    built_with = {
        "backend": options.backend,
        "version": version,
        "capability": capability,
        "vlmport": vlmport.__version__,
        "masking": options.masking,
        "refit": options.refit,
        "strip_weights": options.strip_weights,
    }
    plans = []
    for source in sources:
        profiles = graph_profiles(manifest, source, options)
        weights = [digests[path] for path in _weight_paths(bundle, source, digests)]
        digest = _digest(source, weights, profiles, built_with)
        plans.append(EnginePlan(source, profiles, digest))
    return plans


def _weight_paths(bundle: Path, source: EngineSource, digests: Mapping[str, str]) -> list[str]:
    folder = PurePosixPath(source.path.parent.relative_to(bundle).as_posix())
    paths = [str(folder / name) for name in source.weight_files]
    if missing := [path for path in paths if path not in digests]:
        msg = (
            f"{source.graph}: its weights lie in {', '.join(missing)}; expected files of the "
            "bundle's manifest; export the bundle again"
        )
        raise EngineError(msg)
    return paths


def _digest(
    source: EngineSource,
    weights: Sequence[str],
    profiles: Sequence[EngineProfile],
    built_with: Mapping[str, object],
) -> str:
    content = {
        "graph": hashlib.sha256(source.model).hexdigest(),
        "weights": list(weights),
        "profiles": [asdict(profile) for profile in profiles],
        **built_with,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def reusable_engines(folder: Path, plans: Sequence[EnginePlan]) -> dict[str, Engine]:
    """Graph -> engine that is there, undamaged, and follows from the same."""
    try:
        known = read_engine_set(folder)
    except EngineError:
        return {}  # missing or damaged: everything is built
    wanted = {plan.source.graph: plan.source_sha256 for plan in plans}
    return {
        engine.graph: engine
        for engine in known.engines
        if wanted.get(engine.graph) == engine.source_sha256
        and engine.file == f"{engine.graph}.engine"  # no path that leads elsewhere
        and (folder / engine.file).is_file()
        and file_entry(folder, folder / engine.file).sha256 == engine.sha256
    }
