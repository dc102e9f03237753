"""Traces a PyTorch module into an ONNX graph without ever holding its weights.

The module is built on torch's meta device, its parameters become fake tensors for the trace, and
the graph's initializers become recipes that name the checkpoint's tensors. Only small computed
buffers (rotary frequencies, position ids) have values.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from vlmport.errors import ExportError
from vlmport.export.direct_decomposition import direct_decomposition
from vlmport.export.precision import default_dtype
from vlmport.export.recipe import PlannedWeight, WeightRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch.export.dynamic_shapes import _DimHint

__all__ = ["OPSET", "GraphPort", "TracedModule", "build_on_meta", "trace"]

# The first opset with TensorScatter and with Attention's nonpad_kv_seqlen.
OPSET = 24
_TRACE_KEYS = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


@dataclass(frozen=True, slots=True)
class GraphPort:
    """An input or output of a graph to be traced.

    Attributes:
        name: name in the graph.
        dtype: torch element type.
        shape: a fixed length, or the name of a dynamic axis.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class TracedModule:
    """What `trace` needs of one graph.

    Attributes:
        name: name of the graph.
        build: makes the module; runs under the meta device and must not read weights. Its
            parameter names are the names under which the checkpoint's tensors are found.
        inputs: ports, in the order of the module's arguments; the ports after `single_inputs`
            are passed as one list.
        outputs: ports, in the order of the module's results.
        single_inputs: how many inputs are arguments of their own.
        dtype: element type of the parameters; the default one while `build` runs.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[GraphPort, ...]
    outputs: tuple[GraphPort, ...]
    single_inputs: int
    dtype: torch.dtype = torch.float32


def build_on_meta(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Builds a module whose parameters have no storage and whose computed buffers have values.

    transformers models initialise their own non-persistent buffers (`_init_weights`), which is
    also how `from_pretrained` restores them after building on the meta device.

    Args:
        build: makes the module.
        dtype: the default one while it does.

    Returns:
        The module in evaluation mode; parameters on "meta", buffers on "cpu".
    """
    with default_dtype(dtype), _quiet_transformers():
        with torch.device("meta"):
            module = build().eval()
        _initialise_buffers(module)
    return module


def _initialise_buffers(module: nn.Module) -> None:
    for owner in module.modules():
        initialise = getattr(owner, "_init_weights", None)
        if initialise is None:
            continue
        for part in owner.modules():
            if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
                for name, buffer in list(part.named_buffers(recurse=False)):
                    part._buffers[name] = torch.empty_like(buffer, device="cpu")
                initialise(part)


def trace(graph: TracedModule, sample_lengths: Mapping[str, int]) -> ir.Model:
    """Traces one graph.

    Args:
        graph: the module and its ports.
        sample_lengths: a length of two or more for each dynamic axis that the ports name; axes of
            the same meaning must differ from other axes so that no equality is assumed.

    Returns:
        An ONNX IR model at opset 24 in which every parameter is a `PlannedWeight`.

    Raises:
        ExportError: if an initializer is neither a parameter nor a computed buffer.
    """
    module = build_on_meta(graph.build, graph.dtype)
    buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_meta}
    with _computed_shapes(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        _fake_parameters(module, graph.dtype)
        samples = [_sample(port, sample_lengths) for port in graph.inputs]
        axes = [_dynamic_axes(port) for port in graph.inputs]
        count = graph.single_inputs
        arguments: list[Any] = samples[:count]
        dynamic: list[Any] = axes[:count]
        if len(samples) > count:
            arguments.append(samples[count:])
            dynamic.append(axes[count:])
        with _quiet_torch(), direct_decomposition():
            program = torch.onnx.export(
                module,
                tuple(arguments),
                dynamo=True,
                # onnxscript's optimizer reads values; ours runs when the weights are set aside.
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=[port.name for port in graph.inputs],
                output_names=[port.name for port in graph.outputs],
                dynamic_shapes=tuple(dynamic),
            )
        del mode
    assert program is not None
    model = program.model
    _plan_weights(model, graph.name, module, buffers)
    _name_axes(model, graph)
    _drop_traces(model)
    return model


def _computed_shapes() -> contextlib.AbstractContextManager[object]:
    """Lets torch compute each operator's shape rather than look it up.

    With dynamic axes a hit costs as much as the computation, and a miss is dear: of small models
    the trace takes a fifth less time without, of 12 equal layers as long.
    """
    from torch._dynamo import config

    patch: Callable[..., contextlib.AbstractContextManager[object]] = config.patch
    return patch(fake_tensor_cache_enabled=False)


def _drop_traces(model: ir.Model) -> None:
    """Takes out what torch records of its own sources: paths of the machine that exported.

    The modules' names, under "namespace" and "pkg.torch.onnx.name_scopes", stay.
    """
    for node in model.graph:
        for key in _TRACE_KEYS:
            node.metadata_props.pop(key, None)


def _fake_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Replaces meta parameters by fake ones of `dtype` on "cpu"; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                part._parameters[name] = made[id(parameter)]


def _sample(port: GraphPort, lengths: Mapping[str, int]) -> torch.Tensor:
    shape = [axis if isinstance(axis, int) else lengths[axis] for axis in port.shape]
    return torch.zeros(shape, dtype=port.dtype)


def _dynamic_axes(port: GraphPort) -> dict[int, _DimHint]:
    return {index: Dim.DYNAMIC for index, axis in enumerate(port.shape) if isinstance(axis, str)}


def _plan_weights(
    model: ir.Model, graph: str, module: nn.Module, buffers: Mapping[str, torch.Tensor]
) -> None:
    parameters = set(dict(module.named_parameters(remove_duplicate=False)))
    unfed: list[str] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if name in parameters:
            dims = [int(length) for length in tensor.shape.numpy()]
            value.const_value = PlannedWeight(name, tensor.dtype, dims, WeightRecipe((name,)))
        elif name in buffers:
            value.const_value = ir.tensor(_numpy(buffers[name]), name=name)
        elif isinstance(getattr(tensor, "raw", None), torch._subclasses.FakeTensor):
            unfed.append(name)
    if unfed:
        msg = (
            f"{graph}: the trace needs values of {', '.join(unfed)}, which are neither parameters "
            "nor buffers that the model initialises; make them buffers set in _init_weights"
        )
        raise ExportError(msg)


def _numpy(buffer: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any]
    if buffer.dtype == torch.bfloat16:  # which numpy has not
        array = buffer.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = buffer.detach().numpy()
    return array


def _name_axes(model: ir.Model, graph: TracedModule) -> None:
    """Gives the dynamic axes the ports' names in place of the tracer's symbols."""
    names: dict[str, str] = {}
    values = [*model.graph.inputs, *model.graph.outputs]
    for value, port in zip(values, (*graph.inputs, *graph.outputs), strict=True):
        assert value.shape is not None
        for found, axis in zip(value.shape, port.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(axis, str) and found.value:
                names.setdefault(str(found.value), axis)
    for value in _all_values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(length, names) for length in value.shape])
    for value, port in zip(values, (*graph.inputs, *graph.outputs), strict=True):
        value.shape = ir.Shape(port.shape)


def _renamed(length: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | ir.SymbolicDim:
    if isinstance(length, ir.SymbolicDim) and length.value is not None:
        return ir.SymbolicDim(names.get(str(length.value), str(length.value)))
    return length


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Hides what torch says about every export (torchvision is absent, dynamic axes are new)."""
    loggers: Sequence[logging.Logger] = (
        logging.getLogger("torch.onnx._internal.exporter._registration"),
        logging.getLogger("torch.onnx"),
    )
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides warnings of transformers about configurations that are as we want them."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
