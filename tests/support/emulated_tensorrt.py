"""TensorRT whose engines are ONNX graphs that ONNX Runtime runs on the emulated GPU's memory.

It enforces what TensorRT leaves undefined: shapes inside of the profile, an address for every
tensor, one address for an output in place and its input, no other overlap, and that a captured run
is only launched while its context is as it was then.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import json
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from pydantic import TypeAdapter
from support.emulated_cuda import MisuseError, Work

from vlmport.contract_engines import Engine
from vlmport.runtime.device.sizes import ALIGNMENT, itemsize, size_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from support.emulated_cuda import EmulatedCuda

    from vlmport.contract_engines import EnginePort

__all__ = ["EmulatedTensorRT", "plan_of"]

_ENGINE = TypeAdapter(Engine)
_ACTIVATIONS = 5000  # bytes that a context wants
_NAMES = {
    "bool": "BOOL",
    "float16": "HALF",
    "float32": "FLOAT",
    "int64": "INT64",
}


def plan_of(engine: Engine, model: str, version: str) -> bytes:
    """A serialized engine: which ONNX graph runs, and with which ports and profiles."""
    content = {"version": version, "model": model, "engine": _ENGINE.dump_python(engine)}
    return b"etrt" + json.dumps(content).encode()


@dataclass(frozen=True)
class _Named:
    name: str


class _Logger:
    """Stands in for ILogger, which users derive from."""


class _Strategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class _Specialization(enum.Enum):
    LAZY = 0
    EAGER = 1


class EmulatedTensorRT:
    """Takes the place of the module tensorrt_rtx.

    Args:
        cuda: whose memory and streams are used.
        version: that plans must have.
        capturable: what contexts say of their work.

    Attributes:
        contexts: how many execution contexts were made.
        host_ports: names of ports that must lie on the host.
    """

    ILogger = _Logger
    ExecutionContextAllocationStrategy = _Strategy
    DynamicShapesKernelSpecializationStrategy = _Specialization

    def __init__(self, cuda: EmulatedCuda, version: str, *, capturable: bool = True) -> None:
        self.__name__ = "emulated_tensorrt"
        self.__version__ = version
        self.cuda = cuda
        self.capturable = capturable
        self.contexts = 0
        self.host_ports: frozenset[str] = frozenset()

    def Runtime(self, logger: Any) -> _Runtime:  # noqa: N802  the name is TensorRT's
        """Makes what loads engines."""
        return _Runtime(self, logger)


class _Runtime:
    def __init__(self, module: EmulatedTensorRT, logger: Any) -> None:
        self._module = module
        self._logger = logger

    def deserialize_cuda_engine(self, plan: Any) -> _LoadedEngine | None:
        content = bytes(plan)
        found = json.loads(content[4:]) if content[:4] == b"etrt" else {"version": "no plan"}
        if found["version"] != self._module.__version__:
            self._logger.log(_Named("ERROR"), "Serialization assertion header.magicTag failed.")
            return None
        engine = _ENGINE.validate_python(found["engine"])
        return _LoadedEngine(self._module, engine, found["model"])


class _Config:
    """IRuntimeConfig."""

    strategy = _Strategy.STATIC
    dynamic_shapes_kernel_specialization_strategy = _Specialization.LAZY

    def set_execution_context_allocation_strategy(self, strategy: _Strategy) -> None:
        self.strategy = strategy


class _LoadedEngine:
    """ICudaEngine."""

    device_memory_size_v2 = _ACTIVATIONS

    def __init__(self, module: EmulatedTensorRT, engine: Engine, model: str) -> None:
        self.module = module
        self.engine = engine
        self.model = model
        self.ports = {port.name: port for port in (*engine.inputs, *engine.outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.engine.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_dtype(self, name: str) -> _Named:
        return _Named(_NAMES[self.ports[name].dtype])

    def get_tensor_location(self, name: str) -> _Named:
        return _Named("HOST" if name in self.module.host_ports else "DEVICE")

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.ports[name].aliases or None

    def create_runtime_config(self) -> _Config:
        return _Config()

    def create_execution_context(self, config: _Config) -> _Context:
        if config.strategy is not _Strategy.USER_MANAGED:
            raise MisuseError("the emulation has no memory of its own for a context")
        self.module.contexts += 1
        return _Context(self, config)


class _Context:
    """IExecutionContext."""

    def __init__(self, loaded: _LoadedEngine, config: _Config) -> None:
        self._loaded = loaded
        strategy = config.dynamic_shapes_kernel_specialization_strategy
        self._is_eager = strategy is _Specialization.EAGER
        self._config = weakref.ref(config)
        self._cuda = loaded.module.cuda
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._changes = 0
        self._prepared = -1  # changes at the last run that was not captured

    def set_device_memory(self, memory: int, size: int) -> None:
        self._cuda.check_range(memory, size, "device")
        self._memory = (memory, size)
        self._changes += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        self._changes += 1
        return index < len(self._loaded.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        port = self._loaded.ports[name]
        for limits in self._loaded.engine.profiles[self._profile].ranges:
            if limits.port == name:
                ends = zip(limits.smallest, shape, limits.largest, strict=True)
                if not all(least <= length <= most for least, length, most in ends):
                    return False
        fixed = zip(port.shape, shape, strict=True)
        if any(isinstance(axis, int) and axis != length for axis, length in fixed):
            return False
        self._shapes[name] = shape
        self._changes += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % ALIGNMENT:
            raise MisuseError(f"{name}: its address is not aligned to {ALIGNMENT}")
        self._addresses[name] = address
        self._changes += 1
        return name in self._loaded.ports

    def infer_shapes(self) -> list[str]:
        inputs = self._loaded.engine.inputs
        missing = [port.name for port in inputs if port.name not in self._shapes]
        if not missing:
            self._lengths()
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._output_shapes()[name] if name not in self._shapes else self._shapes[name]

    def is_stream_capturable(self, stream: int) -> bool:
        return self._loaded.module.capturable

    def execute_async_v3(self, stream: int) -> bool:
        self._check()
        arrays = {**self._shapes, **self._output_shapes()}
        addresses, changes = dict(self._addresses), self._changes
        if self._cuda.is_capturing(stream):
            if not self._is_eager:
                raise MisuseError("a fallback kernel could be captured")
            if self._prepared != changes:
                raise MisuseError("a run is captured whose shapes have not run before")
        else:
            self._prepared = changes

        def check() -> None:
            if self._changes != changes:
                raise MisuseError("a captured run is launched whose context has changed")

        def run() -> None:
            self._check_memory(arrays, addresses)
            _run(self._loaded, arrays, addresses)

        self._cuda.queue(stream, Work(run, check))
        return True

    def _check(self) -> None:
        ports = self._loaded.ports
        if self._config() is None:
            raise MisuseError("the context's configuration is gone")
        if missing := [*self.infer_shapes(), *(ports.keys() - self._addresses.keys())]:
            raise MisuseError(f"no shape or no address: {missing}")
        if self._memory[1] < _ACTIVATIONS:
            raise MisuseError("too little memory for activations")
        self._cuda.check_range(*self._memory, "device")
        shapes = {**self._shapes, **self._output_shapes()}
        self._check_memory(shapes, self._addresses)
        for output in self._loaded.engine.outputs:
            for name, other in ports.items():
                if name == output.name:
                    continue
                overlap = _overlap(
                    (self._addresses[output.name], size_of(output.dtype, shapes[output.name])),
                    (self._addresses[name], size_of(other.dtype, shapes[name])),
                )
                if (name == output.aliases) != overlap:
                    raise MisuseError(f"{output.name} and {name}: overlap is {overlap}")

    def _check_memory(
        self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
    ) -> None:
        for name, port in self._loaded.ports.items():
            size = size_of(port.dtype, shapes[name])
            self._cuda.check_range(addresses[name], size, "device")

    def _lengths(self) -> dict[str, int]:
        """Of the axes by their names; raises as TensorRT does if they contradict each other."""
        lengths: dict[str, int] = {}
        for port in self._loaded.engine.inputs:
            for axis, length in zip(port.shape, self._shapes[port.name], strict=True):
                if isinstance(axis, str) and lengths.setdefault(axis, length) != length:
                    raise RuntimeError(f"{port.name}: {axis} is {length} and {lengths[axis]}")
        return lengths

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        engine, lengths = self._loaded.engine, self._lengths()
        if all(
            isinstance(axis, int) or axis in lengths
            for port in engine.outputs
            for axis in port.shape
        ):
            return {port.name: _lengths(port, lengths) for port in engine.outputs}
        key = tuple((port.name, port.dtype, self._shapes[port.name]) for port in engine.inputs)
        return _run_shapes(self._loaded.model, key)


def _lengths(port: EnginePort, lengths: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(lengths[axis] if isinstance(axis, str) else axis for axis in port.shape)


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first[0] < second[0] + second[1] and second[0] < first[0] + first[1]


@functools.cache
def _session(model: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def _run_shapes(
    model: str, key: tuple[tuple[str, str, tuple[int, ...]], ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes of outputs that do not follow from the inputs' names of axes: by running once."""
    session = _session(model)
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: np.ones(shape, dtype) for name, dtype, shape in key})
    return {name: array.shape for name, array in zip(names, found, strict=True)}


def _run(
    loaded: _LoadedEngine, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
) -> None:
    session = _session(loaded.model)
    binding = session.io_binding()
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(_array(addresses[name], port, shapes[name]))
        for name, port in loaded.ports.items()
    }
    for port in loaded.engine.inputs:
        binding.bind_ortvalue_input(port.name, values[port.name])
    for port in loaded.engine.outputs:
        binding.bind_ortvalue_output(port.name, values[port.aliases or port.name])
    session.run_with_iobinding(binding)


def _array(address: int, port: EnginePort, shape: tuple[int, ...]) -> NDArray[Any]:
    count = int(np.prod(shape)) * itemsize(port.dtype)
    content = (ctypes.c_byte * count).from_address(address)
    array: NDArray[Any] = np.ctypeslib.as_array(content).view(np.dtype(port.dtype))
    return array.reshape(shape)
