"""Reads, checks and writes a bundle's manifest.json, and checks the files that it lists.

A manifest may come from anywhere, so nothing in it is believed: types, ranges and paths are
checked here, once, and all faults of one file are reported in one error. Code that holds a
`Manifest` from `load_manifest` needs no checks of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vlmport.contract import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest
from vlmport.errors import BundleError
from vlmport.manifest_rules import manifest_faults

__all__ = ["file_entry", "graphs_digest", "load_manifest", "save_manifest", "verify_files"]

_BLOCK_BYTES = 1 << 20
_MANIFEST = TypeAdapter(Manifest)


def load_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest and check everything that it says.

    Files are not opened: see `verify_files`.

    Args:
        bundle: folder of the bundle.

    Returns:
        The manifest; its needed graphs exist, its paths stay inside the bundle, its numbers are
        finite and in range.

    Raises:
        BundleError: no such folder, no manifest, not JSON, faults (all of one kind listed at once),
            or a manifest that a newer vlmport wrote.
    """
    content = _read_manifest(bundle)
    subject = f"{bundle / MANIFEST_NAME}"
    _check_is_json_object(content, subject)
    try:
        manifest = _MANIFEST.validate_json(content, strict=True)
    except ValidationError as error:
        raise BundleError(_fault_list(subject, _validation_faults(error))) from error
    faults = manifest_faults(manifest)
    if faults:
        raise BundleError(_fault_list(subject, faults))
    return manifest


def save_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write `manifest` as bundle/manifest.json, in one step, so that no half file is ever seen.

    Args:
        bundle: an existing folder.
        manifest: keys of dictionaries and lists of files are sorted; the order of graphs, inputs
            and outputs means something and stays.

    Raises:
        BundleError: the manifest has a fault that `load_manifest` would refuse.
    """
    faults = manifest_faults(manifest)
    if faults:
        raise BundleError(_fault_list(f"{bundle / MANIFEST_NAME} (not written)", faults))
    text = json.dumps(_MANIFEST.dump_python(_sorted(manifest), mode="json"), indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=bundle, prefix=f".{MANIFEST_NAME}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes a private file; a bundle is for others to read
        os.replace(temporary, bundle / MANIFEST_NAME)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def verify_files(
    bundle: Path, manifest: Manifest, *, hashes: bool, elsewhere: Collection[str] = ()
) -> None:
    """Check that every file of the manifest is in the bundle as it was written.

    Args:
        bundle: folder of the bundle.
        manifest: from `load_manifest`.
        hashes: also compare SHA-256 digests, which reads every byte.
        elsewhere: graphs that are not run from this folder, so that their files may be missing.

    Raises:
        BundleError: lists every file that is missing, of another size, of another content, or a
            link that leaves the bundle.
    """
    root = bundle.resolve()
    absent = tuple(manifest.graph(name).file for name in elsewhere)  # weights: the name goes on
    faults = [
        f"{entry.path}: {fault}"
        for entry in manifest.files
        if not entry.path.startswith(absent)
        and (fault := _file_fault(root, entry, hashes=hashes)) is not None
    ]
    if faults:
        raise BundleError(_fault_list(f"{bundle}", faults, "Copy or export the bundle again."))


def file_entry(root: Path, path: Path) -> FileEntry:
    """Measure and hash one file, reading it in blocks of 1 MiB.

    Args:
        root: folder that the entry's path is relative to.
        path: a file below `root`.
    """
    relative = path.relative_to(root).as_posix()
    return FileEntry(path=relative, size=path.stat().st_size, sha256=_sha256(path))


def graphs_digest(manifest: Manifest) -> str:
    """SHA-256 over the digests of a bundle's graphs and their weights, in their order.

    Tokenizer, licence and reports do not count: what was made from the graphs stays right.
    """
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    content = hashlib.sha256()
    for graph in manifest.graphs:
        for path in sorted(path for path in digests if path.startswith(graph.file)):
            content.update(f"{path} {digests[path]}\n".encode())
    return content.hexdigest()


def _read_manifest(bundle: Path) -> bytes:
    path = bundle / MANIFEST_NAME
    if not bundle.exists():
        raise BundleError(f"{bundle}: no such path; expected the folder of a bundle")
    if not bundle.is_dir():
        raise BundleError(f"{bundle}: a file; expected the folder of a bundle")
    if not path.is_file():
        hint = "; this looks like a checkpoint, run `vlmport export` on it first"
        raise BundleError(
            f"{bundle}: no {MANIFEST_NAME} in it; expected a folder that `vlmport export` wrote"
            f"{hint if (bundle / 'config.json').exists() else ''}"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error


def _check_is_json_object(content: bytes, subject: str) -> None:
    """Refuse what is not a JSON object, and another schema before its unknown keys are listed."""
    try:
        parsed: object = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{subject}: not valid JSON ({error}); the file is damaged, export the bundle again"
        ) from error
    if not isinstance(parsed, dict):
        raise BundleError(f"{subject}: a JSON {type(parsed).__name__}; expected an object")
    version: object = parsed.get("schema_version")
    if isinstance(version, int) and version != SCHEMA_VERSION:
        is_newer = version > SCHEMA_VERSION
        age, advice = ("a newer", "upgrade vlmport, or ") if is_newer else ("an older", "")
        raise BundleError(
            f"{subject}: schema_version {version}, written by {age} vlmport; this one reads "
            f"{SCHEMA_VERSION}; {advice}export the bundle again with this one"
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _validation_faults(error: ValidationError) -> list[str]:
    """One line a place: "field.path: what was found; what was expected"."""
    expected: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path = _field_path(detail["loc"])
        found[path], wanted = _found_and_expected(detail)
        expected.setdefault(path, []).append(wanted)
    return [f"{path}: {found[path]}; {' or '.join(expected[path])}" for path in found]


def _field_path(location: Sequence[int | str]) -> str:
    """("graphs", 0, "shape", 1, "int") -> "graphs[0].shape[1]"; "int" is pydantic's union tag."""
    parts = list(location)
    if len(parts) > 1 and parts[-1] in ("int", "str") and isinstance(parts[-2], int):
        parts.pop()
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def _found_and_expected(detail: ErrorDetails) -> tuple[str, str]:
    if detail["type"] in ("missing", "missing_argument"):
        return "missing", "expected, since no field is optional"
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return "unknown field", f"expected only the fields of schema_version {SCHEMA_VERSION}"
    message = detail["msg"].replace("Input should be ", "expected ")
    return f"found {_shorten(detail['input'])}", message


def _shorten(value: Any) -> str:  # Any: whatever the JSON held
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fault_list(subject: str, faults: Iterable[str], advice: str = "") -> str:
    lines = list(faults)
    count = f"{len(lines)} fault{'s' if len(lines) > 1 else ''}"
    tail = f"\n{advice}" if advice else ""
    return f"{subject}: {count} found:\n" + "\n".join(f"  {line}" for line in lines) + tail


def _sorted(manifest: Manifest) -> Manifest:
    return replace(
        manifest,
        graphs=tuple(
            replace(graph, operators=dict(sorted(graph.operators.items())))
            for graph in manifest.graphs
        ),
        source=replace(manifest.source, files=_by_path(manifest.source.files)),
        tools=dict(sorted(manifest.tools.items())),
        files=_by_path(manifest.files),
    )


def _by_path(files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    return tuple(sorted(files, key=lambda entry: entry.path))


def _file_fault(root: Path, entry: FileEntry, *, hashes: bool) -> str | None:
    path = root / entry.path
    if not path.resolve().is_relative_to(root):
        return f"leads out of the bundle, to {path.resolve()}; expected a file inside it"
    if not path.is_file():
        return f"no such file; expected {entry.size} bytes"
    size = path.stat().st_size
    if size != entry.size:
        return f"{size} bytes; expected {entry.size}"
    if hashes and (digest := _sha256(path)) != entry.sha256:
        return f"sha256 {digest[:16]}...; expected {entry.sha256[:16]}..., its content was changed"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
