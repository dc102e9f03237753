"""TensorRT as a side of a search: engines that also give out inner values, on the GPU.

An engine is built for the very shapes of a run, with batch 1, when such a run comes. It is not the
one that `vlmport build` made, whose layers may be fused in another way.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import onnx_ir as ir

from vlmport.api.bisect_onnxruntime import with_outputs
from vlmport.api.bisect_values import inner_values
from vlmport.contract_engines import (
    ENGINES_SCHEMA_VERSION,
    BuildOptions,
    EngineProfile,
    EngineSet,
    PortRange,
)
from vlmport.graphs.engine_source import source_of
from vlmport.graphs.tensorrt_form import rewrite_for_tensorrt_
from vlmport.manifest import load_manifest
from vlmport.runtime.device.cuda import load_cuda
from vlmport.runtime.device.sizes import size_of
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.builder import EngineBuilder
from vlmport.runtime.engines.log import engine_logger
from vlmport.runtime.engines.opening import LoadedEngines, load_engine
from vlmport.runtime.engines.progress import BuildWatch
from vlmport.runtime.engines.running import RunningEngines
from vlmport.runtime.engines.target import choose_target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.contract_engines import Engine, EngineSource, TensorRTName
    from vlmport.runtime.device.cuda import Cuda
    from vlmport.runtime.engines.bindings import Bindings

    Feed = Mapping[str, NDArray[Any]]
    Shapes = tuple[tuple[str, tuple[int, ...]], ...]

__all__ = ["TensorRTSide", "open_tensorrt_side"]

_PROFILE: Final = "default"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class BuildEngine(Protocol):
    """Builds an engine; see `EngineBuilder.build`."""

    def __call__(
        self,
        source: EngineSource,
        profiles: Sequence[EngineProfile],
        folder: Path,
        watch: BuildWatch,
    ) -> tuple[Engine, list[str]]:
        """The engine, written to the folder, and what TensorRT said."""
        ...


def open_tensorrt_side(bundle: Path, backend: TensorRTName) -> TensorRTSide:
    """A side on the GPU at hand.

    Raises:
        EngineError: if TensorRT, cuda-python, a driver or a GPU is missing.
    """
    bindings = load_bindings(backend)
    cuda = load_cuda()
    options = _options(backend)
    builder = EngineBuilder(bindings, options, choose_target(bindings, options))
    return TensorRTSide(bundle, backend, bindings, cuda, builder.build)


def _options(backend: TensorRTName) -> BuildOptions:
    """Shapes are those of each run; how attention is masked is what `vlmport build` does."""
    return BuildOptions(backend, max_batch=1, max_length=1, prefill_chunk=1, max_images=1)


class TensorRTSide:
    """The graphs of a bundle as engines of their own.

    Args:
        bundle: its folder.
        backend: which TensorRT it is.
        bindings: its module.
        cuda: the GPU.
        build: makes engines.
    """

    def __init__(
        self,
        bundle: Path,
        backend: TensorRTName,
        bindings: Bindings,
        cuda: Cuda,
        build: BuildEngine,
    ) -> None:
        self.name = f"{backend} {bindings.__version__} on {cuda.device().name}"
        self.bindings = bindings
        self.cuda = cuda
        self.build = build
        self._bundle = bundle
        self._backend: TensorRTName = backend
        self._manifest = load_manifest(bundle)

    @contextlib.contextmanager
    def open(self, graph: str, values: Sequence[str]) -> Iterator[_Engines]:
        """Engines of a graph with further values as outputs, which are built when they are run."""
        path = self._bundle / self._manifest.graph(graph).file
        with (
            tempfile.TemporaryDirectory(prefix="vlmport.") as folder,
            contextlib.closing(_Engines(self, path, graph, values, Path(folder))) as engines,
        ):
            yield engines

    def known(self, graph: str, values: Sequence[str]) -> tuple[str, ...]:
        """Floats of known rank; what TensorRT computes of shapes on the host is no output."""
        model = ir.load(self._bundle / self._manifest.graph(graph).file)
        inner_values(model)
        found = {
            value.name
            for node in model.graph
            for value in node.outputs
            if value.dtype in _FLOATS and value.shape is not None
        }
        return tuple(name for name in values if name in found)

    def engine_set(self, engine: Engine) -> EngineSet:
        """What engine.json would say of one engine."""
        return EngineSet(
            schema_version=ENGINES_SCHEMA_VERSION,
            version=self.bindings.__version__,
            capability="",
            device="",
            graphs_sha256="",
            options=_options(self._backend),
            engines=(engine,),
            tools={},
        )


class _Engines:
    """A graph with marked values: an engine for each set of input shapes that came."""

    def __init__(
        self, side: TensorRTSide, path: Path, graph: str, values: Sequence[str], folder: Path
    ) -> None:
        self._side = side
        self._path = path
        self._graph = graph
        self._values = values
        self._folder = folder
        self._running: dict[Shapes, RunningEngines] = {}

    def run(self, names: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """The values of these names; bfloat16 as float32."""
        shapes = tuple((name, array.shape) for name, array in feed.items())
        if shapes not in self._running:
            self._running[shapes] = self._start(dict(shapes))
        found = _run(self._running[shapes], self._graph, feed)
        return [found[name] for name in names]

    def close(self) -> None:
        """Frees the GPU's memory."""
        for running in self._running.values():
            running.close()
        self._running = {}

    def _start(self, shapes: Mapping[str, tuple[int, ...]]) -> RunningEngines:
        side = self._side
        source = self._source(shapes)
        ranges = tuple(
            PortRange(port.name, *(shapes[port.name],) * 3)
            for port in source.inputs
            if any(isinstance(axis, str) for axis in port.shape)
        )
        profile = EngineProfile(_PROFILE, ranges, activation_bytes=None)
        folder = self._folder / str(len(self._running))
        folder.mkdir()
        watch = BuildWatch(lambda _: None, threading.Event())
        engine, _ = side.build(source, (profile,), folder, watch)
        runtime = side.bindings.Runtime(engine_logger(side.bindings))
        loaded = load_engine(folder / engine.file, engine, runtime, side.cuda)
        engines = LoadedEngines(folder, side.engine_set(engine), {self._graph: loaded}, runtime)
        return RunningEngines(side.cuda, side.bindings, engines)

    def _source(self, shapes: Mapping[str, tuple[int, ...]]) -> EngineSource:
        model = ir.load(self._path)
        inner_values(model)  # ports need types and ranks
        with_outputs(model, self._values)
        _name_axes(model)
        rewrite_for_tensorrt_(model)
        return source_of(ir.to_proto(model), self._path, self._graph, _capacity(model, shapes))


def _capacity(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> int:
    for port in model.graph.inputs:
        for axis, length in zip(port.shape or (), shapes[str(port.name)], strict=True):
            if not isinstance(axis, int) and axis.value == "capacity":
                return length
    return 0


def _name_axes(model: ir.Model) -> None:
    """Axes of marked values whose length is not known get names of their own."""
    for value in model.graph.outputs:
        axes = value.shape or ()
        value.shape = ir.Shape(
            f"{value.name}.{index}" if not isinstance(axis, int) and axis.value is None else axis
            for index, axis in enumerate(axes)
        )


def _run(running: RunningEngines, graph: str, feed: Feed) -> dict[str, NDArray[Any]]:
    context = running.context(graph, _PROFILE)
    context.set_shapes({name: array.shape for name, array in feed.items()})
    addresses = {}
    for port in context.engine.inputs:
        array = feed[port.name]
        size = size_of(port.dtype, array.shape)
        addresses[port.name] = running.workspace.address(port.name, size)
        running.transfer.upload(array, port.dtype, addresses[port.name])
    shapes = {port.name: context.output_shape(port.name) for port in context.engine.outputs}
    for port in context.engine.outputs:
        size = size_of(port.dtype, shapes[port.name])
        addresses[port.name] = (
            addresses[port.aliases] if port.aliases else running.workspace.address(port.name, size)
        )
    context.bind(addresses)
    context.enqueue()
    return {
        port.name: running.transfer.download(addresses[port.name], port.dtype, shapes[port.name])
        for port in context.engine.outputs
    }
