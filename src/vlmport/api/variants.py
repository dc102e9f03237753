"""Opened bundles in which only some layers are quantized, made and thrown away one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeAlias

from vlmport.api.linked_bundle import changed_graph

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

    from vlmport.runtime import VisionLanguageModel

__all__ = ["MakeVariant", "OpenVariant", "variants_of"]

# (graph, names of the layers to quantize) -> that graph, all other weights the float bundle's.
MakeVariant: TypeAlias = "Callable[[str, Sequence[str]], ir.Model]"
# graph -> names of the layers to quantize; graphs that are not named stay in float.
OpenVariant: TypeAlias = (
    "Callable[[Mapping[str, Sequence[str]]], AbstractContextManager[VisionLanguageModel]]"
)


def variants_of(bundle: Path, model: VisionLanguageModel, make_variant: MakeVariant) -> OpenVariant:
    """What opens variants of a bundle.

    A variant's sessions are those of `model` but for its changed graphs, and the files of these are
    gone when it is closed. Two variants are never open at once unless the caller holds them.

    Args:
        bundle: folder of the float bundle.
        model: the same, opened.
        make_variant: quantizes some layers of a graph.
    """

    @contextlib.contextmanager
    def opened(layers: Mapping[str, Sequence[str]]) -> Iterator[VisionLanguageModel]:
        variant = model
        for graph, names in layers.items():
            if not names:
                continue
            with changed_graph(bundle, make_variant(graph, names)) as path:
                variant = variant.with_graph(graph, path)
        yield variant

    return opened
