"""Graphs that are changed for a while, beside links to the weights that they share with a bundle."""

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

__all__ = ["folder_beside", "link_file", "linked_weights", "save_beside_links"]

# Below this a tensor lies in the graph's own file, as a bundle's graphs have it.
_SMALL_BYTES = 1024


@contextlib.contextmanager
def linked_weights(bundle: Path) -> Iterator[Path]:
    """A temporary folder with links to a bundle's weights, for graphs that read them.

    It lies beside the bundle if that place can be written, where links cost nothing.
    """
    with tempfile.TemporaryDirectory(prefix=".vlmport.", dir=folder_beside(bundle)) as name:
        folder = Path(name)
        for source in sorted(bundle.rglob("*.data")):
            place = folder / source.relative_to(bundle)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_file(source, place)
        yield folder


def folder_beside(bundle: Path) -> Path | None:
    """The folder that the bundle lies in, or None where nothing can be written there.

    Weights can be linked from one to the other.
    """
    parent = bundle.resolve().parent
    return parent if os.access(parent, os.W_OK) else None


def link_file(source: Path, place: Path) -> None:
    """Links a file, or copies it where the file system has no links."""
    try:
        os.link(source.resolve(), place)
    except OSError:
        shutil.copyfile(source, place)


def save_beside_links(model: ir.Model, path: Path) -> None:
    """Writes a graph; weights that it shares with the bundle are not written again.

    Args:
        model: its initializers are external tensors of the bundle, or new ones, which go into a
            file of their own: a graph's own file holds at most 2 GiB. The model is changed.
        path: in a folder of `linked_weights`, in the place that the bundle's graph has.
    """
    values = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes >= _SMALL_BYTES
    ]
    tensors = [value.const_value for value in values if value.const_value is not None]
    written = ir.external_data.convert_tensors_to_external(
        tensors, path.parent, f"{path.name}.changed.data"
    )
    for value, tensor in zip(values, written, strict=True):
        value.const_value = tensor
    ir.save(model, path)
