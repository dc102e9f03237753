"""Computes what is constant in a traced graph, weights set aside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript import optimizer

from vlmport.export.recipe import planned

if TYPE_CHECKING:
    from vlmport.export.recipe import PlannedWeight

__all__ = ["FoldConstantsPass"]


class FoldConstantsPass(ir.passes.InPlacePass):
    """Folds constants, drops dead and doubled nodes with onnxscript's optimizer.

        Constant -> Reshape -> Slice(x, starts, ...)   =>   Slice(x, starts, ...)

    Planned weights have no values, so they stand as graph inputs meanwhile and come back
    afterwards; weights that nothing reads are dropped.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; always counts as modified."""
        aside = _set_weights_aside(model)
        optimizer.optimize(model, onnx_shape_inference=False)
        _bring_weights_back(model, aside)
        return ir.passes.PassResult(model, modified=True)


def _set_weights_aside(model: ir.Model) -> list[tuple[ir.Value, PlannedWeight]]:
    aside: list[tuple[ir.Value, PlannedWeight]] = []
    for name, value in list(model.graph.initializers.items()):
        weight = planned(value)
        if weight is None:
            continue
        del model.graph.initializers[name]
        value.const_value = None
        if value.uses():
            model.graph.inputs.append(value)
            aside.append((value, weight))
    return aside


def _bring_weights_back(model: ir.Model, aside: list[tuple[ir.Value, PlannedWeight]]) -> None:
    for value, weight in aside:
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = weight
            model.graph.initializers.add(value)
