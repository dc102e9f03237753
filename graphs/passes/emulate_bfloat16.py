"""Turns a bfloat16 graph into a float32 one whose numbers are those of bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.graphs.value_types import MOVES, infer_types

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["EmulateBfloat16Pass", "widen_values_"]


class EmulateBfloat16Pass(ir.passes.InPlacePass):
    """Computes every node in float32 and rounds its result to bfloat16.

        a -> MatMul(w) -> y, all bfloat16
     => a -> MatMul(Cast(w, float32)) -> Cast(bfloat16) -> Cast(float32) -> y, a and y float32

    For providers without bfloat16 kernels. Weights stay bfloat16 in the file. The result is what a
    machine gives that computes inside each node in float32, in some other order of summation; one
    that rounds within a node (RMSNormalization before its scale) rounds more often.

    Raises:
        GraphError: if the type of a node's output is not known, or it holds a graph of its own.

    Refuses when:
      1. nothing in the graph is bfloat16.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether anything was bfloat16."""
        results, modified = widen_values_(model, (ir.DataType.BFLOAT16,))
        for value in results:
            node = value.producer()
            assert node is not None
            if node.op_type not in MOVES:
                _round(model, node, value)
        return ir.passes.PassResult(model, modified)


def widen_values_(model: ir.Model, dtypes: Collection[ir.DataType]) -> tuple[list[ir.Value], bool]:
    """Makes values of half precision float32, weights by casts in front of all nodes.

    Args:
        model: the graph; its weights stay as they are in the file.
        dtypes: what counts as half precision.

    Returns:
        The results of nodes among them, in order, and whether there was anything to widen.

    Raises:
        GraphError: if the type of a node's output is not known, or it holds a graph of its own.
    """
    infer_types(model)
    nodes = list(model.graph)
    weights = [value for value in model.graph.initializers.values() if value.dtype in dtypes]
    results = [value for node in nodes for value in node.outputs if value.dtype in dtypes]
    inputs = [value for value in model.graph.inputs if value.dtype in dtypes]
    for value in (*inputs, *results):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in weights:
        _widen_weight(model, nodes[0], value)
    for node in nodes:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in dtypes:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return results, bool(weights or inputs or results)


def _widen_weight(model: ir.Model, first: ir.Node, weight: ir.Value) -> None:
    """Gives a weight's readers its float32 values, by a cast in front of the first node."""
    uses = list(weight.uses())  # without the cast
    cast = ir.node("Cast", [weight], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].name = f"{weight.name}.float32"
    model.graph.insert_before(first, cast)
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])


def _round(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Puts the rounding behind a value; the rounded one takes its name and its readers."""
    name, uses, is_output = value.name, list(value.uses()), value.is_graph_output()
    value.name = f"{name}.unrounded"
    narrow = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)})
    narrow.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    narrow.outputs[0].name = f"{name}.bfloat16"
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    rounded = wide.outputs[0]
    rounded.name, rounded.type, rounded.shape = name, value.type, value.shape
    model.graph.insert_after(node, [narrow, wide])
    for use in uses:
        use.node.replace_input_with(use.idx, rounded)
    if is_output:
        outputs = model.graph.outputs
        outputs[outputs.index(value)] = rounded
