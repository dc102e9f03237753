"""Compares the ports of a loaded engine with what engine.json says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import tensorrt as trt

    from vlmport.contract_engines import Engine, EnginePort

__all__ = ["check_ports"]

# TensorRT's names of element types -> numpy's.
_DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}


def check_ports(path: Path, engine: Engine, loaded: trt.ICudaEngine) -> None:
    """Checks names, element types, places, addresses that must be equal, and profiles' number.

    Args:
        path: of the engine, for the message.
        engine: what engine.json says.
        loaded: what TensorRT loaded.

    Raises:
        EngineError: with all differences.
    """
    if faults := list(_faults(engine, loaded)):
        msg = (
            f"{path}: {'; '.join(faults)}; the file and engine.json do not belong together; build "
            "the engines again with `vlmport build`"
        )
        raise EngineError(msg)


def _faults(engine: Engine, loaded: trt.ICudaEngine) -> Iterator[str]:
    found = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    expected = {port.name for port in (*engine.inputs, *engine.outputs)}
    if found != expected:
        yield f"found the ports {sorted(found)}, expected {sorted(expected)}"
        return
    for port in (*engine.inputs, *engine.outputs):
        dtype = _DTYPES.get(loaded.get_tensor_dtype(port.name).name, "another type")
        if dtype != port.dtype:
            yield f"{port.name} is {dtype}, expected {port.dtype}"
        # TensorRT reads what shapes follow from on the host; here everything lies on the GPU.
        if loaded.get_tensor_location(port.name).name != "DEVICE":
            yield f"{port.name} must lie on the host, expected on the GPU"
    yield from _alias_faults(engine.outputs, loaded)
    if loaded.num_optimization_profiles != len(engine.profiles):
        yield (
            f"found {loaded.num_optimization_profiles} optimization profiles, expected "
            f"{len(engine.profiles)}"
        )


def _alias_faults(outputs: tuple[EnginePort, ...], loaded: trt.ICudaEngine) -> Iterator[str]:
    for port in outputs:
        alias = loaded.get_aliased_input_tensor(port.name) or ""
        if alias != port.aliases:
            expected = port.aliases or "no input"
            yield f"{port.name} is written over {alias or 'no input'}, expected {expected}"
