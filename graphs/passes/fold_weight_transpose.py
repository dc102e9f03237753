"""Moves the transposition of a weight from the graph into the weight's recipe."""

from __future__ import annotations

import onnx_ir as ir

from vlmport.export.recipe import PlannedWeight, planned

__all__ = ["FoldWeightTransposePass"]


class FoldWeightTransposePass(ir.passes.InPlacePass):
    """Streams a weight transposed instead of transposing it at load.

        weight -> Transpose(1, 0) -> MatMul   =>   weight' -> MatMul

    Refuses when:
      1. the input is not a planned weight;
      2. the weight does not have two axes or the permutation is not their swap.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether a transposition was folded."""
        count = sum(self._fold(model, node) for node in list(model.graph))
        return ir.passes.PassResult(model, bool(count))

    @staticmethod
    def _fold(model: ir.Model, node: ir.Node) -> bool:
        if node.op_type != "Transpose":
            return False
        source = node.inputs[0]
        weight = planned(source)
        if source is None or weight is None:  # case 1
            return False
        permutation = node.attributes["perm"].as_ints() if "perm" in node.attributes else (1, 0)
        if len(weight.dims) != 2 or tuple(permutation) != (1, 0):  # case 2
            return False
        name = f"{source.name}.T"
        turned = model.graph.initializers.get(name)
        if turned is None:
            planned_turned = PlannedWeight(
                name, weight.dtype, weight.dims[::-1], weight.recipe.transposed()
            )
            turned = ir.Value(
                name=name,
                shape=ir.Shape(weight.dims[::-1]),
                type=source.type,
                const_value=planned_turned,
            )
            model.graph.initializers.add(turned)
        node.outputs[0].replace_all_uses_with(turned, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        if not source.uses():
            del model.graph.initializers[str(source.name)]
        return True
