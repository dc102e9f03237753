"""Brings queries, keys and values into heads together instead of one by one."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmport.graphs.constants import add_integers
from vlmport.graphs.fusion import as_ints

__all__ = ["MergeHeadSplitsPass"]

_TO_HEADS = (0, 2, 1, 3)  # [batch, sequence_length, heads, head_dim] -> heads before sequence


@dataclass(frozen=True, slots=True)
class _Part:
    """One output of the split on its way into heads."""

    reshape: ir.Node
    transpose: ir.Node
    heads: int
    head_dim: int


class MergeHeadSplitsPass(ir.passes.InPlacePass):
    """Splits along the heads, after one reshape and one transposition.

        Split(x, axis=-1) -> n x (Reshape [0, 0, heads_i, head_dim] -> Transpose(0, 2, 1, 3))
     => Reshape [0, 0, sum of heads, head_dim] -> Transpose(0, 2, 1, 3) -> Split(axis=1)

    Four nodes fewer a layer: a decode step is made of many small nodes whose start costs more than
    their work.

    Refuses when:
      1. the split is not along the last axis;
      2. an output has another reader, or is not reshaped into heads and transposed;
      3. the heads differ in length.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether splits were merged."""
        count = sum(_merge(model, node) for node in list(model.graph) if node.op_type == "Split")
        return ir.passes.PassResult(model, bool(count))


def _merge(model: ir.Model, split: ir.Node) -> bool:
    source = split.inputs[0]
    if source is None or split.attributes["axis"].as_int() != -1:  # case 1
        return False
    found = [_part(output) for output in split.outputs]
    parts = [part for part in found if part is not None]
    if len(parts) != len(found) or len({part.head_dim for part in parts}) != 1:  # cases 2, 3
        return False
    heads, head_dim = [part.heads for part in parts], parts[0].head_dim
    lengths = add_integers(model, f"{source.name}.heads", [0, 0, sum(heads), head_dim])
    sizes = add_integers(model, f"{source.name}.heads_each", heads)
    reshape = ir.node("Reshape", [source, lengths])
    transpose = ir.node("Transpose", [reshape.outputs[0]], {"perm": _TO_HEADS})
    merged = ir.node("Split", [transpose.outputs[0], sizes], {"axis": 1}, num_outputs=len(parts))
    made = [reshape, transpose, merged]
    for node in made[:2]:
        node.outputs[0].type = source.type
    olds = [part.transpose.outputs[0] for part in parts]
    for old, new in zip(olds, merged.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    model.graph.insert_before(split, made)
    for old, new in zip(olds, merged.outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    unread = [node for part in parts for node in (part.transpose, part.reshape)]
    model.graph.remove([*unread, split], safe=True)
    return True


def _part(output: ir.Value) -> _Part | None:
    reshape = _only_reader(output, "Reshape")
    lengths = as_ints(reshape.inputs[1]) if reshape is not None else None
    if reshape is None or lengths is None or len(lengths) != 4 or lengths[:2] != [0, 0]:
        return None
    transpose = _only_reader(reshape.outputs[0], "Transpose")
    if transpose is None or tuple(transpose.attributes["perm"].as_ints()) != _TO_HEADS:
        return None
    return _Part(reshape, transpose, lengths[2], lengths[3])


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != operator:
        return None
    return uses[0].node
