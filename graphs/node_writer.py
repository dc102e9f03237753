"""Writes graphs node by node, constants in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

__all__ = ["NodeWriter"]

_IR_VERSION = 11  # the first that knows opset 24 is 11; TensorRT reads it, too


class NodeWriter:
    """Collects the nodes of one graph of standard operators.

    Args:
        opset: version of the standard operators.
    """

    def __init__(self, opset: int = 24) -> None:
        self._opset = opset
        self._tape = ir.tape.Tape()
        self._inputs: list[ir.Value] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Adds an input of the graph."""
        port = ir.val(name, dtype=dtype, shape=shape)
        self._inputs.append(port)
        return port

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """An initializer; the same one for the same content."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.tensor(array, name=f"constant_{len(self._constants)}")
            self._constants[key] = self._tape.initializer(tensor)
        return self._constants[key]

    def add(self, op_type: str, *inputs: ir.Value | float, **attributes: int) -> ir.Value:
        """Adds a node with one output and returns that.

        Args:
            op_type: standard operator.
            inputs: values; numbers become float32 scalars.
            attributes: of the node.
        """
        values = [
            value if isinstance(value, ir.Value) else self.constant(np.array(value, np.float32))
            for value in inputs
        ]
        return self._tape.op(op_type, values, attributes)

    def reduce(
        self, op_type: str, value: ir.Value, *axes: int, keeps_axes: bool = True
    ) -> ir.Value:
        """Adds a reduction over axes."""
        places = self.constant(np.array(axes, np.int64))
        return self.add(op_type, value, places, keepdims=int(keeps_axes))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """Adds a Reshape; 0 keeps an axis and -1 takes what is left."""
        return self.add("Reshape", value, self.constant(np.array(shape, np.int64)))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Adds a Cast."""
        return self.add("Cast", value, to=int(dtype))

    def model(
        self, name: str, outputs: Sequence[tuple[str, ir.Value, ir.DataType, Sequence[int | str]]]
    ) -> onnx.ModelProto:
        """The finished graph.

        Args:
            name: of the graph.
            outputs: name, value, type and shape of each.
        """
        ports = []
        for port_name, value, dtype, shape in outputs:
            port = self.add("Identity", value)
            port.name, port.dtype, port.shape = port_name, dtype, ir.Shape(shape)
            ports.append(port)
        graph = ir.Graph(
            self._inputs,
            ports,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": self._opset},
            name=name,
        )
        return ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION))
