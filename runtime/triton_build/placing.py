"""Where the engines of a repository lie, and whether those that are there serve."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from vlmport.contract_engines import ENGINES_NAME
from vlmport.engine_manifest import load_engine_set, save_engine_set
from vlmport.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vlmport.contract_engines import EngineSet
    from vlmport.runtime.triton_build.step import EngineStep

__all__ = ["OWN_FOLDER", "PLAN_NAME", "engine_faults", "place_engines"]

OWN_FOLDER = "engines"  # of the main model's version folder
PLAN_NAME = "model.plan"


def place_engines(home: Path, step: EngineStep, built: EngineSet, workspace: Path) -> None:
    """Moves new engines to the models that run them, each with an engine.json beside it.

    An engine.json goes first and comes last, so that an interrupted placing is seen.

    Args:
        home: the main model's version folder.
        step: which model runs which engine.
        built: all of them.
        workspace: the folder that they lie in, on the same file system; what is left in it is the
            main model's.
    """
    engines = {engine.graph: engine for engine in built.engines}
    for graph in step.graphs:
        if graph.version_folder:
            folder = home / graph.version_folder
            engine = engines[graph.graph]
            (folder / ENGINES_NAME).unlink(missing_ok=True)
            if graph.is_own:
                shutil.copyfile(workspace / engine.file, workspace / PLAN_NAME)
                os.replace(workspace / PLAN_NAME, folder / PLAN_NAME)
            else:
                os.replace(workspace / engine.file, folder / PLAN_NAME)
            placed = replace(engine, file=PLAN_NAME)
            save_engine_set(folder, replace(built, engines=(placed,)))
    own = tuple(engines[graph.graph] for graph in step.graphs if graph.is_own)
    save_engine_set(workspace, replace(built, engines=own))
    folder = home / OWN_FOLDER
    if folder.exists():
        shutil.rmtree(folder)
    workspace.chmod(0o755)
    workspace.rename(folder)


def engine_faults(
    home: Path, step: EngineStep, version: str, capability: str, digests: Mapping[str, str]
) -> list[str]:
    """What keeps the engines that are there from serving; nothing if they do.

    Args:
        home: the main model's version folder.
        step: which engines there must be.
        version: of the TensorRT that is installed.
        capability: of the GPU, as `Target` has it.
        digests: graph -> what its engine must follow from.
    """
    wanted = (step.options.backend, version, capability)
    faults = []
    for folder, graphs in _folders(home, step).items():
        try:
            found = load_engine_set(folder)
        except EngineError as error:
            is_there = (folder / ENGINES_NAME).exists()
            faults.append(str(error) if is_there else f"{folder}: found no engines")
            continue
        made_for = (found.options.backend, found.version, found.capability)
        if made_for != wanted:
            faults.append(
                f"{folder}: found engines for {_words(made_for)}; expected {_words(wanted)}"
            )
            continue
        each = (_engine_fault(folder, found, graph, digests[graph]) for graph in graphs)
        faults += [fault for fault in each if fault]
    return faults


def _folders(home: Path, step: EngineStep) -> dict[Path, list[str]]:
    """Folder of an engine.json -> graphs whose engines must be there."""
    folders = {home / OWN_FOLDER: [graph.graph for graph in step.graphs if graph.is_own]}
    for graph in step.graphs:
        if graph.version_folder:
            folders[(home / graph.version_folder).resolve()] = [graph.graph]
    return folders


def _words(made_for: tuple[str, str, str]) -> str:
    backend, version, capability = made_for
    return f"{backend} {version} on {capability}"


def _engine_fault(folder: Path, found: EngineSet, graph: str, digest: str) -> str:
    if not found.has_engine(graph):
        return f"{folder}: found no engine of {graph}"
    engine = found.engine(graph)
    path = folder / engine.file
    if engine.source_sha256 != digest:
        return f"{path}: found an engine of another graph or of other options"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != engine.sha256:
            return f"{path}: its content is not what {ENGINES_NAME} says (other SHA-256)"
    return ""
