"""ONNX Runtime on the CPU as a side of a search: as the bundle is, or in float32."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from vlmport.api.bisect_values import inner_values
from vlmport.api.linked_bundle import changed_graph
from vlmport.graphs.passes.emulate_bfloat16 import EmulateBfloat16Pass
from vlmport.graphs.passes.widen_half import WidenHalfPass
from vlmport.manifest import load_manifest
from vlmport.runtime.backends.onnxruntime import open_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]

__all__ = ["OnnxRuntimeSide", "with_outputs"]

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntimeSide:
    """The graphs of a bundle on the CPU.

    Args:
        bundle: its folder.
        computes: "as_bundle", which for bfloat16 rounds every node's result to it, or "float32".
    """

    def __init__(self, bundle: Path, computes: Literal["as_bundle", "float32"]) -> None:
        self._bundle = bundle
        self._manifest = load_manifest(bundle)
        self._computes = computes
        precision = "float32" if computes == "float32" else self._manifest.precision
        self.name = f"onnxruntime-cpu, {precision}"

    @contextlib.contextmanager
    def open(self, graph: str, values: Sequence[str]) -> Iterator[_Session]:
        """Opens a graph with further values as outputs."""
        model = self._load(graph)
        if self._computes == "float32":
            WidenHalfPass()(model)
        elif self._manifest.precision == "bfloat16":
            EmulateBfloat16Pass()(model)
        with_outputs(model, values)
        with changed_graph(self._bundle, model) as path:
            session = open_session(path, None, self._manifest.precision)
        yield _Session(session)

    def known(self, graph: str, values: Sequence[str]) -> tuple[str, ...]:
        """All values that nodes of the bundle's graph compute."""
        found = {value.name for value in inner_values(self._load(graph))}
        return tuple(name for name in values if name in found)

    def _load(self, graph: str) -> ir.Model:
        return ir.load(self._bundle / self._manifest.graph(graph).file)


def with_outputs(model: ir.Model, values: Sequence[str]) -> None:
    """Makes values outputs of a graph, in the order of its nodes, behind those that it has."""
    outputs = {value.name for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name in values and value.name not in outputs:
                model.graph.outputs.append(value)


class _Session:
    """A session that takes floats of any type."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._types = {
            port.name: _TYPES[port.type] for port in session.get_inputs() if port.type in _TYPES
        }

    def run(self, names: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """The values of these names."""
        if not names:
            return []  # where ONNX Runtime would give all outputs
        cast = {
            name: array.astype(self._types.get(name, array.dtype), copy=False)
            for name, array in feed.items()
        }
        found: list[NDArray[Any]] = self._session.run(list(names), cast)
        return found
