"""The ports of a parsed network beside those of the graph that it came from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlmport.errors import EngineError
from vlmport.runtime.engines.shapes import shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import tensorrt as trt

    from vlmport.contract_engines import EnginePort, EngineSource

__all__ = ["check_ports", "numpy_name", "with_aliases"]

_NUMPY_NAMES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}


def numpy_name(dtype: trt.DataType) -> str:
    """The name of an element type in numpy, or of bfloat16 in ml_dtypes.

    Raises:
        EngineError: if no port can have it.
    """
    if dtype.name not in _NUMPY_NAMES:
        msg = f"element type {dtype.name}: expected one of {', '.join(_NUMPY_NAMES)}"
        raise EngineError(msg)
    return _NUMPY_NAMES[dtype.name]


def check_ports(network: trt.INetworkDefinition, source: EngineSource) -> None:
    """Refuses a network whose inputs or outputs are not those of the graph.

    Raises:
        EngineError: names each port that is missing, or of another type or rank.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    faults = [*_faults(inputs, source.inputs), *_faults(outputs, source.outputs)]
    if faults:
        msg = f"{source.graph}: {'; '.join(faults)}; expected the ports of {source.path.name}"
        raise EngineError(msg)


def _faults(tensors: Sequence[trt.ITensor], ports: Sequence[EnginePort]) -> list[str]:
    found = {tensor.name: (numpy_name(tensor.dtype), len(shape_of(tensor))) for tensor in tensors}
    wanted = {port.name: (port.dtype, len(port.shape)) for port in ports}
    return [
        f"{name}: found {found.get(name, 'none')}, expected {wanted.get(name, 'none')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def with_aliases(ports: Sequence[EnginePort], aliases: Mapping[str, str]) -> tuple[EnginePort, ...]:
    """The outputs with the inputs that they are written into."""
    return tuple(replace(port, aliases=aliases.get(port.name, "")) for port in ports)
