"""Spares the exporter a second trace of a program of which only a few operators must be replaced.

torch.onnx decomposes what it has no translation for by tracing the whole program again, which
takes longer than the first trace. In traced vision-language models that changes a handful of
operators, each of which one other operator stands for; they are replaced where they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OperatorBase, OpOverload
from torch.export import ExportedProgram

__all__ = ["decompose_directly", "direct_decomposition"]

_aten = torch.ops.aten
# Composite operators that torch.onnx translates as they are, and leaves alone when it decomposes.
_TAKEN_WHOLE = frozenset(
    (
        _aten.concat.default,
        _aten.conv2d.default,
        _aten.layer_norm.default,
        _aten.linear.default,
        _aten.matmul.default,
        _aten.scaled_dot_product_attention.default,
        _aten.sym_size.int,
        _aten.type_as.default,
    )
)
# Checks of the trace, which torch.onnx drops afterwards.
_ASSERTIONS = frozenset((_aten._assert_scalar.default, _aten._assert_tensor_metadata.default))


@contextlib.contextmanager
def direct_decomposition() -> Iterator[None]:
    """Lets programs be decomposed without a second trace where that is possible, for a while."""
    trace_again: Callable[..., ExportedProgram] = ExportedProgram.run_decompositions

    def run_decompositions(
        program: ExportedProgram,
        decomp_table: dict[OperatorBase, Callable[..., Any]] | None = None,
        decompose_custom_triton_ops: bool = False,
    ) -> ExportedProgram:
        if decomp_table is not None and decompose_directly(program.graph_module, decomp_table):
            return program
        return trace_again(program, decomp_table, decompose_custom_triton_ops)

    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = trace_again  # type: ignore[method-assign]


def decompose_directly(
    module: fx.GraphModule, decompositions: Mapping[OperatorBase, Callable[..., Any]]
) -> bool:
    """Replaces operators by others of the same result, in place.

    Args:
        module: of an exported program; means the same afterwards, whatever is returned.
        decompositions: of operators that must not be left.

    Returns:
        Whether that was all: False if an operator is left that has to be decomposed, or is
        composite and not known here; and if any writes into its input, since a view is not
        replaced by a copy then.
    """
    if any(map(_writes, module.graph.nodes)):
        return False
    for node in list(module.graph.nodes):
        replace = _REPLACEMENTS.get(node.target)
        if replace is not None:
            replace(node)
    module.recompile()
    return all(_may_stay(node, decompositions) for node in module.graph.nodes)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _may_stay(node: fx.Node, decompositions: Mapping[OperatorBase, Callable[..., Any]]) -> bool:
    operator = node.target
    if node.op == "get_attr":  # a subgraph of a branch or loop
        return False
    if operator in _ASSERTIONS:
        return True
    if not isinstance(operator, OpOverload):
        return not isinstance(operator, OperatorBase)  # of higher order: it runs subgraphs
    is_composite = operator.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )
    return not (operator in decompositions or (is_composite and operator not in _TAKEN_WHOLE))


def _convert(node: fx.Node) -> None:
    """Replaces `to` by a conversion, or by nothing where the type is the same already."""
    value = _input(node)
    if value.meta["val"].dtype == node.meta["val"].dtype:
        _drop(node)
    else:
        _become(node, _aten._to_copy.default, value, dtype=node.meta["val"].dtype)


def _leave_out(node: fx.Node) -> None:
    """Drops `dropout` outside of training."""
    is_training = node.args[2] if len(node.args) > 2 else node.kwargs["train"]
    if not is_training:
        _drop(node)


def _reshape(node: fx.Node, lengths: Any) -> None:
    """Replaces `reshape` by a view of a copy, which ONNX has not: there the copy vanishes."""
    value = _input(node)
    if str(value.meta["val"].shape) == str(node.meta["val"].shape):  # text: comparing would guard
        _drop(node)
        return
    with node.graph.inserting_before(node):
        form: dict[str, Any] = {"memory_format": torch.contiguous_format}
        copy = node.graph.call_function(_aten.clone.default, (value,), form)
    copy.meta = {**node.meta, "val": value.meta["val"]}
    _become(node, _aten._unsafe_view.default, copy, lengths)


def _flatten(node: fx.Node) -> None:
    """Replaces `flatten` by a reshape whose merged axis is the rest."""
    value, axes = _input(node), list[Any](node.args[1:])
    lengths: list[Any] = list(value.meta["val"].shape)
    if node.kwargs or not lengths:
        return
    first, last = (int(axis) % len(lengths) for axis in (*axes, *(0, -1)[len(axes) :]))
    kept = {axis for axis in range(len(lengths)) if not first <= axis <= last}
    for axis in kept:
        if not isinstance(lengths[axis], int):
            with node.graph.inserting_before(node):
                size = node.graph.call_function(_aten.sym_size.int, (value, axis))
            size.meta = {**node.meta, "val": lengths[axis]}
            lengths[axis] = size
    _reshape(node, [*lengths[:first], -1, *lengths[last + 1 :]])


def _unpad(node: fx.Node) -> None:
    """Replaces the convolution whose padding is a word by the one with numbers."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    found = dict(zip(names, node.args, strict=False)) | node.kwargs
    if found.get("padding", "valid") == "valid":
        value = found["input"]
        rest = {name: found[name] for name in names[1:] if name in found}
        _become(node, _aten.conv2d.default, value, **rest | {"padding": [0, 0]})


def _drop(node: fx.Node) -> None:
    if any(user.op == "output" for user in node.users):  # the program's signature names it
        _become(node, _aten.clone.default, _input(node))
    else:
        node.replace_all_uses_with(_input(node))
        node.graph.erase_node(node)


def _input(node: fx.Node) -> fx.Node:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def _become(node: fx.Node, operator: OpOverload, *arguments: Any, **named: Any) -> None:
    node.target, node.args, node.kwargs = operator, arguments, named


_REPLACEMENTS: dict[Any, Callable[[fx.Node], None]] = {
    _aten.__and__.Tensor: lambda node: _become(node, _aten.bitwise_and.Tensor, *node.args),
    _aten.conv2d.padding: _unpad,
    _aten.dropout.default: _leave_out,
    _aten.flatten.using_ints: _flatten,
    _aten.reshape.default: lambda node: _reshape(node, [*node.args, *node.kwargs.values()][1]),
    _aten.square.default: lambda node: _become(node, _aten.pow.Tensor_Scalar, node.args[0], 2),
    _aten.to.device: _convert,
    _aten.to.dtype: _convert,
    _aten.to.dtype_layout: _convert,
}
