"""Joins products of one input with several weights into one product."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.export.recipe import PlannedWeight, WeightRecipe, planned
from vlmport.graphs.constants import add_integers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FuseParallelMatmulPass"]


class FuseParallelMatmulPass(ir.passes.InPlacePass):
    """Reads an activation once for all the weights that it is multiplied with.

        x -> MatMul(q) [-> Add(bias)], x -> MatMul(k) ..., x -> MatMul(v) ...
     => x -> MatMul(q|k|v) [-> Add(biases)] -> Split

    Fewer and larger products: each starts the thread pool once and streams its weight in one
    piece. The weights are joined in their recipes.

    Refuses when:
      1. fewer than two planned, transposed weights share the input;
      2. some products have a bias and others have none.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether products were joined."""
        groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            weight = planned(node.inputs[1]) if node.op_type == "MatMul" else None
            if weight is not None and weight.recipe.transpose and node.inputs[0] is not None:
                groups[node.inputs[0]].append(node)
        count = sum(_join(model, nodes) for nodes in groups.values() if len(nodes) > 1)  # case 1
        return ir.passes.PassResult(model, bool(count))


def _join(model: ir.Model, nodes: Sequence[ir.Node]) -> bool:
    biases = [_bias(node) for node in nodes]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return False  # case 2
    source = nodes[0].inputs[0]
    assert source is not None
    weights = [planned(node.inputs[1]) for node in nodes]
    widths = [weight.dims[1] for weight in weights if weight is not None]
    joined = _joined_weight(model, weights, (weights[0].dims[0] if weights[0] else 0, sum(widths)))
    product = ir.node("MatMul", [source, joined])
    made = [product]
    if biases[0] is not None:
        bias_weights = [planned(bias.inputs[1]) for bias in biases if bias is not None]
        bias = _joined_weight(model, bias_weights, (sum(widths),))
        made.append(ir.node("Add", [product.outputs[0], bias]))
    sizes = add_integers(model, f"{joined.name}.widths", widths)
    made.append(
        ir.node("Split", [made[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
    )
    _type_results(made, source, sum(widths))
    last = [bias or node for bias, node in zip(biases, nodes, strict=True)]
    for old, new in zip(last, made[-1].outputs, strict=True):
        new.name, new.type, new.shape = (
            old.outputs[0].name,
            old.outputs[0].type,
            old.outputs[0].shape,
        )
    model.graph.insert_before(nodes[0], made)
    for old, new in zip(last, made[-1].outputs, strict=True):
        old.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)
    _remove(model, [*(bias for bias in biases if bias is not None), *nodes])
    return True


def _bias(node: ir.Node) -> ir.Node | None:
    """The Add of a planned bias that alone reads the product, or None."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add = users[0].node
    other = add.inputs[1 - users[0].idx]
    weight = planned(other)
    if weight is None or len(weight.dims) != 1:
        return None
    if users[0].idx == 1:  # Add commutes; keep the bias second
        add.replace_input_with(0, node.outputs[0])
        add.replace_input_with(1, other)
    return add


def _joined_weight(
    model: ir.Model, weights: Sequence[PlannedWeight | None], dims: tuple[int, ...]
) -> ir.Value:
    parts = [weight for weight in weights if weight is not None]
    # By characters, not by folders: these are names of modules, joined by dots.
    prefix = os.path.commonprefix([str(weight.name) for weight in parts])  # noqa: RUF071
    name = prefix + "+".join(str(weight.name).removeprefix(prefix) for weight in parts)
    sources = tuple(source for weight in parts for source in weight.recipe.sources)
    recipe = WeightRecipe(sources, transpose=parts[0].recipe.transpose)
    value = ir.Value(
        name=name,
        shape=ir.Shape(dims),
        type=ir.TensorType(parts[0].dtype),
        const_value=PlannedWeight(name, parts[0].dtype, dims, recipe),
    )
    model.graph.initializers.add(value)
    return value


def _type_results(nodes: Sequence[ir.Node], source: ir.Value, width: int) -> None:
    for node in nodes[:-1]:
        node.outputs[0].type = source.type
        if source.shape is not None:
            node.outputs[0].shape = ir.Shape([*list(source.shape)[:-1], width])


def _remove(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    weights = [value for node in nodes for value in node.inputs if planned(value) is not None]
    model.graph.remove(nodes, safe=True)
    for value in weights:
        assert value is not None
        if not value.uses():
            model.graph.initializers.pop(str(value.name), None)
