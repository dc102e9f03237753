"""Makes the target of a reshape constant where only unchanged axes are dynamic."""

from __future__ import annotations

import onnx_ir as ir

from vlmport.graphs.constants import add_integers

__all__ = ["FoldReshapeAxesPass"]


class FoldReshapeAxesPass(ir.passes.InPlacePass):
    """Replaces computed lengths by "as in the input" (0) and at most one "the rest" (-1).

        Shape(x), Gather, ..., Concat -> Reshape(x)   =>   Reshape(x, [0, 0, heads, head_dim])

    Refuses when:
      1. the lengths are constant already, or the shapes of input or output are not known;
      2. more than one dynamic axis of the output is not the same axis of the input;
      3. an axis of the output has length zero, which 0 would not mean.

    Source: https://onnx.ai/onnx/operators/onnx__Reshape.html (allowzero=0).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether a target became constant."""
        count = sum(self._fold(model, node) for node in list(model.graph))
        return ir.passes.PassResult(model, bool(count))

    @staticmethod
    def _fold(model: ir.Model, node: ir.Node) -> bool:
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            return False
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if node.inputs[1].const_value is not None or before is None or after is None:  # case 1
            return False
        lengths = [_length(after[axis], before, axis) for axis in range(len(after))]
        if lengths.count(-1) > 1 or 0 in list(after):  # cases 2, 3
            return False
        target = add_integers(model, f"{node.outputs[0].name}.lengths", lengths)
        node.replace_input_with(1, target)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        return True


def _length(after: int | ir.SymbolicDim, before: ir.Shape, axis: int) -> int:
    if isinstance(after, int):
        return after
    same = axis < len(before) and after.value is not None and before[axis] == after
    return 0 if same else -1
