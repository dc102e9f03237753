"""The ports of a network, and of the engine that it became, beside those of the graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlmport.errors import EngineError
from vlmport.runtime.engines.shapes import shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import tensorrt as trt

    from vlmport.contract_engines import Engine, EnginePort, EngineSource

__all__ = ["check_engine_ports", "check_network_ports", "type_name", "with_aliases"]

_NAMES = {"BF16": "bfloat16", "FLOAT": "float32", "HALF": "float16"}


def type_name(dtype: trt.DataType) -> str:
    """Numpy's name of an element type where it has one, else TensorRT's in small letters."""
    return _NAMES.get(dtype.name, dtype.name.lower())


def check_network_ports(network: trt.INetworkDefinition, source: EngineSource) -> None:
    """Refuses a network whose inputs or outputs are not those of the graph.

    Raises:
        EngineError: names each port that is missing, or of another type or rank.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    faults = [
        *_network_faults(inputs, source.inputs),
        *_network_faults(outputs, source.outputs),
    ]
    if faults:
        msg = f"{source.graph}: {'; '.join(faults)}; expected the ports of {source.path.name}"
        raise EngineError(msg)


def _network_faults(tensors: Sequence[trt.ITensor], ports: Sequence[EnginePort]) -> list[str]:
    found = {tensor.name: (type_name(tensor.dtype), len(shape_of(tensor))) for tensor in tensors}
    wanted = {port.name: (port.dtype, len(port.shape)) for port in ports}
    return [
        f"{name}: found {found.get(name, 'none')}, expected {wanted.get(name, 'none')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def with_aliases(ports: Sequence[EnginePort], aliases: Mapping[str, str]) -> tuple[EnginePort, ...]:
    """The outputs with the inputs that they are written into."""
    return tuple(replace(port, aliases=aliases.get(port.name, "")) for port in ports)


def check_engine_ports(path: Path, engine: Engine, loaded: trt.ICudaEngine) -> None:
    """Checks names, element types, places, addresses that must be equal, and profiles' number.

    Args:
        path: of the engine, for the message.
        engine: what engine.json says.
        loaded: what TensorRT loaded.

    Raises:
        EngineError: with all differences.
    """
    if faults := list(_engine_faults(engine, loaded)):
        msg = (
            f"{path}: {'; '.join(faults)}; the file and engine.json do not belong together; build "
            "the engines again with `vlmport build`"
        )
        raise EngineError(msg)


def _engine_faults(engine: Engine, loaded: trt.ICudaEngine) -> Iterator[str]:
    found = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    expected = {port.name for port in (*engine.inputs, *engine.outputs)}
    if found != expected:
        yield f"found the ports {sorted(found)}, expected {sorted(expected)}"
        return
    for port in (*engine.inputs, *engine.outputs):
        dtype = type_name(loaded.get_tensor_dtype(port.name))
        if dtype != port.dtype:
            yield f"{port.name} is {dtype}, expected {port.dtype}"
        # TensorRT reads what shapes follow from on the host; here everything lies on the GPU.
        if loaded.get_tensor_location(port.name).name != "DEVICE":
            yield f"{port.name} must lie on the host, expected on the GPU"
    for port in engine.outputs:
        alias = loaded.get_aliased_input_tensor(port.name) or ""
        if alias != port.aliases:
            wanted = port.aliases or "no input"
            yield f"{port.name} is written over {alias or 'no input'}, expected {wanted}"
    if loaded.num_optimization_profiles != len(engine.profiles):
        yield (
            f"found {loaded.num_optimization_profiles} optimization profiles, expected "
            f"{len(engine.profiles)}"
        )
