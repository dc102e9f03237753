"""Brings queries, keys and values that lie head by head into heads together."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmport.graphs.constants import add_integers
from vlmport.graphs.fusion import as_int, as_ints

__all__ = ["SplitFusedHeadsPass"]

_TO_HEADS = (0, 2, 1, 3)  # [batch, sequence_length, heads, head_dim] -> heads before sequence


@dataclass(frozen=True, slots=True)
class _Part:
    """Queries, keys or values on their way from the reshape into heads."""

    gather: ir.Node
    norm: ir.Node | None
    transpose: ir.Node


class SplitFusedHeadsPass(ir.passes.InPlacePass):
    """Splits along the head's own axis, after one transposition.

        Reshape [0, 0, heads, n, head_dim]
          -> n x (Gather(i, axis=3) -> LayerNormalization(axis=-1)? -> Transpose(0, 2, 1, 3))
     => Reshape [0, 0, heads, n * head_dim] -> Transpose(0, 2, 1, 3) -> Split(axis=3)
          -> LayerNormalization?

    Four nodes fewer a layer, with no weight changed: the product lies as [heads, n, head_dim]
    already, and a normalization over the last axis does not see the order of the others.

    Refuses when:
      1. the reshape is not into five axes of which the last three are fixed;
      2. its readers are not one Gather for each of the n;
      3. a part has another reader, or is not transposed into heads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether heads were split."""
        count = sum(_split(model, node) for node in list(model.graph) if node.op_type == "Reshape")
        return ir.passes.PassResult(model, bool(count))


def _split(model: ir.Model, reshape: ir.Node) -> bool:
    source, lengths = reshape.inputs[0], as_ints(reshape.inputs[1])
    if source is None or lengths is None or len(lengths) != 5 or lengths[:2] != [0, 0]:  # case 1
        return False
    heads, count, head_dim = lengths[2:]
    if min(heads, count, head_dim) < 1:  # case 1
        return False
    parts = _parts(reshape.outputs[0], count)
    if parts is None:
        return False
    wide = add_integers(model, f"{source.name}.fused_heads", [0, 0, heads, count * head_dim])
    sizes = add_integers(model, f"{source.name}.fused_sizes", [head_dim] * count)
    reshaped = ir.node("Reshape", [source, wide])
    transposed = ir.node("Transpose", [reshaped.outputs[0]], {"perm": _TO_HEADS})
    split = ir.node("Split", [transposed.outputs[0], sizes], {"axis": 3}, num_outputs=count)
    for node in (reshaped, transposed):
        node.outputs[0].type = source.type
    model.graph.insert_before(reshape, [reshaped, transposed, split])
    for part, head in zip(parts, split.outputs, strict=True):
        _rewire(part, head)
    gathers = [part.gather for part in parts]
    transposes = [part.transpose for part in parts]
    model.graph.remove([*transposes, *gathers, reshape], safe=True)
    return True


def _parts(fused: ir.Value, count: int) -> list[_Part] | None:
    """One part for each index, in order."""
    found: dict[int, _Part] = {}
    if fused.is_graph_output():  # case 2
        return None
    for use in fused.uses():
        gather = use.node
        index = as_int(gather.inputs[1]) if gather.op_type == "Gather" else None
        if index is None or use.idx or gather.attributes["axis"].as_int() != 3:  # case 2
            return None
        shape = gather.inputs[1].shape if gather.inputs[1] is not None else None
        if shape is None or len(shape) or index in found:  # case 2
            return None
        part = _part(gather)
        if part is None:
            return None
        found[index] = part
    return [found[i] for i in range(count)] if sorted(found) == list(range(count)) else None


def _part(gather: ir.Node) -> _Part | None:
    reader = _only_reader(gather.outputs[0])
    norm = None
    if reader is not None and reader.op_type == "LayerNormalization":
        axis = reader.attributes.get("axis")
        if reader.inputs[0] is not gather.outputs[0] or (axis and axis.as_int() not in (-1, 3)):
            return None  # case 3
        norm, reader = reader, _only_reader(reader.outputs[0])
    if reader is None or reader.op_type != "Transpose":  # case 3
        return None
    if tuple(reader.attributes["perm"].as_ints()) != _TO_HEADS:  # case 3
        return None
    return _Part(gather, norm, reader)


def _rewire(part: _Part, head: ir.Value) -> None:
    """Puts the split's output, normalized where it was, in the place of the transposed part."""
    old = part.transpose.outputs[0]
    head.type = old.type
    head.shape = old.shape
    new = head
    if part.norm is not None:
        part.norm.replace_input_with(0, head)
        new = part.norm.outputs[0]
        new.shape = old.shape
    new.name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
