"""Engines on the GPU: execution contexts that keep their shapes and addresses."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

from vlmport.errors import EngineError
from vlmport.runtime.device.cuda import Stream
from vlmport.runtime.device.memory import DeviceBuffer, Workspace
from vlmport.runtime.device.sizes import ALIGNMENT
from vlmport.runtime.device.transfer import Transfer
from vlmport.runtime.engines.limits import check_shapes, largest_length, profile_of
from vlmport.runtime.engines.log import listening

if TYPE_CHECKING:
    from collections.abc import Mapping

    import tensorrt as trt
    import tensorrt_rtx as rtx

    from vlmport.runtime.device.cuda import Cuda
    from vlmport.runtime.engines.bindings import Bindings, RtxBindings
    from vlmport.runtime.engines.opening import LoadedEngines

__all__ = ["EngineContext", "RunningEngines"]


class RunningEngines:
    """The engines of a bundle, one stream that all work is queued in, and memory that they share.

    TensorRT needs memory for activations only while an engine runs. As one engine runs after the
    other, all contexts share one piece that is large enough for each.

    Attributes:
        cuda: the GPU.
        engines: what engine.json says.
        stream: of all work.
        transfer: copies between host and GPU.
        workspace: of work between two waits.
        lock: held while work is queued, so that threads take turns.
        captures: whether decode steps are captured into CUDA graphs.
        waited_seconds: that the host has waited for decode steps so far.
        is_rtx: whether it is TensorRT-RTX, which has a few more names.
    """

    def __init__(self, cuda: Cuda, bindings: Bindings, loaded: LoadedEngines) -> None:
        self.cuda = cuda
        self.engines = loaded.engines
        self.stream = Stream(cuda)
        self.transfer = Transfer(cuda, self.stream)
        self.workspace = Workspace(cuda)
        self.lock = threading.RLock()
        self.captures = True
        self.waited_seconds = 0.0
        self.is_rtx = loaded.engines.options.backend == "tensorrt-rtx"
        self._bindings = bindings
        self._loaded: LoadedEngines | None = loaded
        size = max(engine.device_memory_size_v2 for engine in loaded.loaded.values())
        self._activations = DeviceBuffer(cuda, max(size, ALIGNMENT), "activations of the engines")

    def context(self, graph: str, profile: str, *, captured: bool = False) -> EngineContext:
        """Makes an execution context.

        Args:
            graph: whose engine.
            profile: name of one of the engine's profiles.
            captured: whether its work will be captured and launched again and again.
        """
        assert self._loaded is not None
        loaded = self._loaded.loaded[graph]
        config = loaded.create_runtime_config()
        strategies = self._bindings.ExecutionContextAllocationStrategy
        config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        if captured and self.is_rtx:
            # What is captured is launched for good, so that it must not be the fallback kernel that
            # runs until the one for these shapes is compiled.
            strategy = cast("RtxBindings", self._bindings).DynamicShapesKernelSpecializationStrategy
            rtx_config = cast("rtx.IRuntimeConfig", config)
            rtx_config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
        with listening() as log:
            context: trt.IExecutionContext | None = loaded.create_execution_context(config)
        if context is None:
            msg = f"{graph}: TensorRT makes no execution context ({'; '.join(log.errors)})"
            raise EngineError(f"{msg}; free memory of the GPU, or build smaller engines")
        selected = EngineContext(self, graph, profile, context, config)
        # TensorRT refuses less than the engine's device_memory_size_v2, whatever the profile needs;
        # this is as much as the largest engine wants.
        context.set_device_memory(self._activations.address, self._activations.size)
        return selected

    def close(self) -> None:
        """Frees the memory; the engines go when nobody holds them any more."""
        self.stream.synchronize()
        self.transfer.close()
        self.workspace.close()
        self._activations.close()
        self._loaded = None
        self.stream.close()


class EngineContext:
    """An engine in one of its profiles.

    Attributes:
        version: changes whenever a shape or an address does; work that was captured before must
            not be launched any more.
    """

    def __init__(
        self,
        running: RunningEngines,
        graph: str,
        profile: str,
        context: trt.IExecutionContext,
        config: trt.IRuntimeConfig,
    ) -> None:
        self.engine = running.engines.engine(graph)
        self.version = 0
        self._is_rtx = running.is_rtx
        self._stream = running.stream
        # The context hands its configuration out and is not said to copy it. It goes before the
        # context, which holds the engine that made it: attributes go in this order.
        self._config = config
        self._context = context
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        index, self._profile = profile_of(self.engine, profile)
        with listening() as log:
            is_set = context.set_optimization_profile_async(index, int(running.stream))
        if not is_set:
            raise EngineError(self._refused(f"the profile {profile}", log.errors))
        running.stream.synchronize()

    def largest(self, port: str, axis: int) -> int:
        """The largest length of an axis of an input that its profile takes."""
        return largest_length(self.engine, self._profile, port, axis)

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sets the shape of every input.

        Raises:
            EngineError: if one lies outside of the profile.
        """
        wanted = {port.name: shapes[port.name] for port in self.engine.inputs}
        if wanted == self._shapes:
            return
        check_shapes(self.engine, self._profile, wanted)
        self.version += 1
        self._shapes = {}  # what is set if TensorRT refuses one is not known
        with listening() as log:
            for name, shape in wanted.items():
                if not self._context.set_input_shape(name, shape):
                    raise EngineError(self._refused(f"the shape {shape} of {name}", log.errors))
            try:
                missing = self._context.infer_shapes()
            except RuntimeError as error:  # shapes that contradict each other
                said = (*log.errors, str(error))
                raise EngineError(self._refused(f"the shapes {wanted}", said)) from error
            if missing:
                raise EngineError(self._refused(f"shapes without {missing}", log.errors))
        self._shapes = wanted

    def output_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output that follows from those of the inputs.

        Raises:
            EngineError: if it depends on their content.
        """
        dimensions = self._context.get_tensor_shape(name)
        shape = tuple(dimensions[axis] for axis in range(len(dimensions)))
        if any(length < 0 for length in shape):  # known only after a run
            raise EngineError(self._refused(f"to tell the shape of {name} from the inputs'", ()))
        return shape

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Says where every input and output lies; outputs in place lie where their input does."""
        for port in (*self.engine.inputs, *self.engine.outputs):
            address = addresses[port.name]
            assert not port.aliases or address == addresses[port.aliases]
            if self._addresses.get(port.name) != address:
                self.version += 1
                if not self._context.set_tensor_address(port.name, address):
                    raise EngineError(self._refused(f"the address of {port.name}", ()))
                self._addresses[port.name] = address

    def enqueue(self) -> None:
        """Queues a run.

        Raises:
            EngineError: if TensorRT refuses.
        """
        with listening() as log:
            is_queued = self._context.execute_async_v3(int(self._stream))
        if not is_queued:
            raise EngineError(self._refused("to run", log.errors))

    def check_capture(self) -> None:
        """Asks TensorRT-RTX whether the work can be captured; TensorRT has no such question.

        Raises:
            EngineError: if it cannot.
        """
        if self._is_rtx:
            context = cast("rtx.IExecutionContext", self._context)
            if not context.is_stream_capturable(int(self._stream)):
                msg = f"{self.engine.graph}: TensorRT-RTX says that its work cannot be captured"
                raise EngineError(msg)

    def _refused(self, what: str, errors: tuple[str, ...]) -> str:
        said = "; ".join(errors) or "it does not say why"
        return (
            f"{self.engine.graph}: TensorRT refuses {what} ({said}); build the engines again with "
            "`vlmport build`, or report it"
        )
