"""Reads, checks and writes engine.json, which lies beside a bundle's TensorRT engines."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from vlmport.contract_engines import ENGINES_NAME, ENGINES_SCHEMA_VERSION, EngineSet
from vlmport.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["load_engine_set", "read_engine_set", "save_engine_set"]

_ENGINE_SET = TypeAdapter(EngineSet)
_AGAIN = "build the engines again with `vlmport build`"


def load_engine_set(folder: Path, elsewhere: Collection[str] = ()) -> EngineSet:
    """Reads engine.json and checks that the engines beside it have the size that it says.

    Args:
        folder: of engine.json and the engines.
        elsewhere: graphs that something else computes; their engines may be missing.

    Raises:
        EngineError: if it is missing, damaged or newer than this vlmport, or an engine is missing
            or of another size; all faults at once.
    """
    engines = read_engine_set(folder)
    if faults := list(_faults(folder, engines, elsewhere)):
        msg = f"{folder}: {'; '.join(faults)}; {_AGAIN}"
        raise EngineError(msg)
    return engines


def read_engine_set(folder: Path) -> EngineSet:
    """Reads engine.json alone.

    Raises:
        EngineError: if it is missing, damaged or newer than this vlmport.
    """
    path = folder / ENGINES_NAME
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); expected engines; {_AGAIN}"
        raise EngineError(msg) from error
    except ValueError as error:
        msg = f"{path}: found no JSON ({error}); {_AGAIN}"
        raise EngineError(msg) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != ENGINES_SCHEMA_VERSION:
        msg = (
            f"{path}: found schema_version {version!r}; this vlmport reads "
            f"{ENGINES_SCHEMA_VERSION}; {_AGAIN}"
        )
        raise EngineError(msg)
    try:
        return _ENGINE_SET.validate_python(content)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        msg = f"{path}: {found}; {_AGAIN}"
        raise EngineError(msg) from error


def save_engine_set(folder: Path, engines: EngineSet) -> None:
    """Writes engine.json into a folder that is not yet in its place."""
    content = json.dumps(_ENGINE_SET.dump_python(engines, mode="json"), indent=2) + "\n"
    (folder / ENGINES_NAME).write_text(content, encoding="utf-8")


def _faults(folder: Path, engines: EngineSet, elsewhere: Collection[str]) -> Iterator[str]:
    for engine in engines.engines:
        if engine.graph in elsewhere:
            continue
        name = PurePosixPath(engine.file)
        path = folder / name
        if len(name.parts) != 1 or name.parts[0] == ".." or path.is_symlink():
            yield f"{engine.file}: expected the plain name of a file beside {ENGINES_NAME}"
        elif not path.is_file():
            yield f"{engine.file}: missing"
        elif path.stat().st_size != engine.size:
            yield f"{engine.file}: found {path.stat().st_size} bytes, expected {engine.size}"
