"""Graphs that are changed for a while and read the weights of a bundle that stays as it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["changed_graph", "folder_beside", "link_file"]

# Below this a tensor lies in the graph's own file, as a bundle's graphs have it.
_SMALL_BYTES = 1024


@contextlib.contextmanager
def changed_graph(bundle: Path, model: ir.Model) -> Iterator[Path]:
    """A graph as a file, with links to the weights that it shares with a bundle; then it is gone.

    A session that was opened in the block holds what it needs. The links must not stay: onnx_ir 1.1
    refuses to read weights from a file with more than one name ("hard link attack").

    Args:
        bundle: folder of the bundle.
        model: its initializers are external tensors of the bundle, or new ones, which go into a
            file of their own: a graph's own file holds at most 2 GiB. The model is changed.

    Yields:
        Path of the graph.
    """
    with tempfile.TemporaryDirectory(prefix=".vlmport.", dir=folder_beside(bundle)) as name:
        folder = Path(name)
        _write_changed(model, folder)
        for location, source in _shared_files(model, folder).items():
            place = folder / location
            place.parent.mkdir(parents=True, exist_ok=True)
            link_file(source, place)
        path = folder / "graph.onnx"
        ir.save(model, path)
        yield path


def folder_beside(bundle: Path) -> Path | None:
    """The folder that the bundle lies in, or None where nothing can be written there.

    Weights can be linked from one to the other.
    """
    parent = bundle.resolve().parent
    return parent if os.access(parent, os.W_OK) else None


def link_file(source: Path, place: Path) -> None:
    """Links a file, or copies it where the file system has no links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _write_changed(model: ir.Model, folder: Path) -> None:
    """Before there are links: tensors that are computed when asked read the bundle's weights."""
    changed = [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes >= _SMALL_BYTES
    ]
    written = ir.external_data.convert_tensors_to_external(
        [tensor for _, tensor in changed], folder, "changed.data"
    )
    for (value, _), tensor in zip(changed, written, strict=True):
        value.const_value = tensor


def _shared_files(model: ir.Model, folder: Path) -> dict[str, Path]:
    """Place relative to the graph -> file, of the weights that lie elsewhere."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    paths = {
        str(one.location): Path(one.path).resolve()
        for one in tensors
        if isinstance(one, ir.ExternalTensor)
    }
    return {place: path for place, path in paths.items() if path.parent != folder.resolve()}
