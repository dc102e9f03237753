"""Builds a graph of a bundle with TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import tensorrt_rtx

from vlmport.graphs.tensorrt_form import tensorrt_form

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["BuildError", "BuildResult", "build_graph"]

trt: Any = tensorrt_rtx  # its stubs leave out much of what is used here

CAPACITY = 128  # rows of the cache, which TensorRT wants static
# Axis of a port -> its smallest, usual and largest length.
RANGES: Mapping[str, tuple[int, int, int]] = {
    "batch": (1, 2, 4),
    "sequence_length": (1, 16, CAPACITY),
    "num_images": (1, 2, 4),
    "num_masks": (1, 2, 4),
    "num_tiles": (1, 2, 4),
    "num_patches": (4, 16, 64),
}
# Two axes of a picture, in multiples of a patch.
SIDES = {"height", "width"}
SIDE_PATCHES = (2, 4, 8)

_HARMLESS = re.compile(r"Make sure input \w+ has Int64 binding")
_UNUSED = re.compile(r"Unused Input: (\S+)")
# Position of nonpad_kv_seqlen among the inputs of Attention (opset 24).
_LENGTHS = 6


class BuildError(Exception):
    """What TensorRT has against a graph."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """An engine that was built.

    Attributes:
        layers: type of a layer of the parsed network -> how many there are.
        bounded_attentions: attention layers that know which rows of the cache are valid.
        engine_bytes: size of the serialized engine.
        warnings: what TensorRT said, without what is known to be harmless.
    """

    layers: Mapping[str, int]
    bounded_attentions: int
    engine_bytes: int
    warnings: tuple[str, ...]


class _Logger(trt.ILogger):  # type: ignore[misc]  # the base is untyped
    """Keeps what is said; a process uses the first logger that it is given, so there is one."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)


_LOGGER = _Logger()


def build_graph(path: Path, capacity: int = CAPACITY) -> BuildResult:
    """Parses and builds a graph, strongly typed, with the attention that it means.

    Args:
        path: <graph>.onnx of a bundle, its weights beside it.
        capacity: rows of the cache.

    Raises:
        BuildError: if it does not parse or build, or an input of a node would be ignored.
    """
    _LOGGER.errors.clear()
    _LOGGER.warnings.clear()
    changed = tensorrt_form(path)
    proto = (
        onnx.load(str(path), load_external_data=False)
        if changed is None
        else onnx.load_model_from_string(changed)
    )
    _fix_axis(proto, "capacity", capacity)
    builder = trt.Builder(_LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, _LOGGER)
    if not parser.parse(proto.SerializeToString(), str(path)):
        found = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise BuildError(f"{path.name}: does not parse: {found}")
    _complete_attention(network, proto)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, proto))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{path.name}: does not build: {_LOGGER.errors[-5:]}")
    _check_nothing_is_ignored(path.name)
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    warnings = tuple(text for text in _LOGGER.warnings if not _HARMLESS.search(text))
    bounded = sum(layer.attention.key_value_lengths is not None for layer in _attentions(network))
    return BuildResult(dict(layers), bounded, int(engine.nbytes), warnings)


def _fix_axis(proto: onnx.ModelProto, axis: str, length: int) -> None:
    for port in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dimension in port.type.tensor_type.shape.dim:
            if dimension.dim_param == axis:
                dimension.dim_value = length


def _check_nothing_is_ignored(name: str) -> None:
    """The builder warns of ports that nothing depends on, the lengths of attention among them."""
    unused = {found[1] for text in _LOGGER.warnings if (found := _UNUSED.search(text))}
    if unused:
        raise BuildError(f"{name}: TensorRT ignores the inputs {sorted(unused)}")


def _lengths(node: onnx.NodeProto) -> str:
    return node.input[_LENGTHS] if len(node.input) > _LENGTHS else ""


def _complete_attention(network: Any, proto: onnx.ModelProto) -> None:
    """Says what the parser leaves out: the rows of the cache that are valid, and the kind of mask.

    The parser drops nonpad_kv_seqlen without a word if it is computed, and imports is_causal as a
    mask that is aligned to the first row of the cache; ONNX aligns it to the last valid one. For
    single precision there is no fused kernel, so the layer may be taken apart.
    """
    nodes = {node.name: node for node in proto.graph.node if node.op_type == "Attention"}
    layers = _attentions(network)
    if len(layers) != len(nodes):
        raise BuildError(f"{len(nodes)} attention nodes became {len(layers)} attention layers")
    for layer in layers:
        node = nodes[layer.name.removesuffix("_AttentionInput")]
        attention = layer.attention
        if layer.get_input(0).dtype == trt.float32:
            attention.decomposable = True
        if _lengths(node):
            _set_key_value_lengths(network, attention, node)


def _attentions(network: Any) -> list[Any]:
    found = []
    for layer in [network.get_layer(index) for index in range(network.num_layers)]:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            found.append(layer)
    return found


def _set_key_value_lengths(network: Any, attention: Any, node: onnx.NodeProto) -> None:
    cast = network.add_cast(_tensor(network, _lengths(node)), trt.int32)
    attention.key_value_lengths = cast.get_output(0)
    causal = any(a.name == "is_causal" and a.i == 1 for a in node.attribute)
    kinds = trt.CausalMaskKind
    attention.causal_kind = kinds.LOWER_RIGHT if causal else kinds.NONE


def _tensor(network: Any, name: str) -> Any:
    for index in range(network.num_inputs):
        if network.get_input(index).name == name:
            return network.get_input(index)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            if layer.get_output(output).name == name:
                return layer.get_output(output)
    raise BuildError(f"{name}: no such tensor in the parsed network")


def _profile(builder: Any, network: Any, proto: onnx.ModelProto) -> Any:
    profile = builder.create_optimization_profile()
    patch = _patch_side(proto)
    for port in proto.graph.input:
        axes = [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
        if not any(isinstance(axis, str) for axis in axes):
            continue
        lengths = [_range(axis, patch) for axis in axes]
        profile.set_shape(port.name, *([length[kind] for length in lengths] for kind in range(3)))
    return profile


def _range(axis: str | int, patch: int) -> tuple[int, int, int]:
    if isinstance(axis, int):
        return axis, axis, axis
    if axis in SIDES:
        least, usual, most = SIDE_PATCHES
        return least * patch, usual * patch, most * patch
    return RANGES[axis]


def _patch_side(proto: onnx.ModelProto) -> int:
    """The stride of the first convolution, in pixels; 1 for a graph without any."""
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Conv" and attribute.name == "strides":
                return int(attribute.ints[0])
    return 1
