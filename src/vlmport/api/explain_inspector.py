"""Reads what TensorRT's engine inspector says of an engine, in the forms that it has had.

A layer is an object where the engine was built with detailed verbosity, else its name alone. Its
tensors have "Format/Datatype" up to TensorRT 10 and "Format" and "DataType" from 11 on; with
dynamic shapes neither is known. "Metadata" holds "[ONNX Layer: NODE]" for each node in the layer,
a unit separator between them.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html
and https://docs.nvidia.com/deeplearning/tensorrt/11.4.0/api/migration/tensorrt-10x-to-11x-IEngineInspector.html
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from vlmport.api.explain_network import nodes_of_metadata
from vlmport.api.explain_report import ExplainedLayer
from vlmport.errors import EngineError

if TYPE_CHECKING:
    from vlmport.api.explain_nodes import GraphNodes

__all__ = ["explain_inspector", "inspector_remarks"]

# A word of a format or type -> numpy's name. The longer words come first.
_TYPES = {
    r"bf16|bfloat16": "bfloat16",
    r"fp16|half|float16": "float16",
    r"fp8|float8\w*": "float8",
    r"fp4|float4\w*": "float4",
    r"fp32|float32|float": "float32",
    r"uint8": "uint8",
    r"int4": "int4",
    r"int8": "int8",
    r"int32": "int32",
    r"int64": "int64",
    r"bool": "bool",
}
_FORMATS = ("Format/Datatype", "DataType", "Datatype", "Format")
# A region that another compiler within TensorRT took over, named by its first and last node.
_REGION = re.compile(r"\{?ForeignNode\[(.+?)\.\.\.(.+?)\]\}?")


def explain_inspector(text: str, nodes: GraphNodes, origin: str) -> tuple[ExplainedLayer, ...]:
    """Every layer of an engine.

    Args:
        text: of IEngineInspector.get_engine_information in JSON, or of trtexec --exportLayerInfo.
        nodes: of the graph that the engine was built from.
        origin: where the text is from, for messages.

    Raises:
        EngineError: if it is not such a text, or names no node of the graph.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        msg = f"{origin}: not JSON ({error}); expected what the engine inspector prints as JSON"
        raise EngineError(msg) from error
    found = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict | str) for one in found):
        msg = (
            f'{origin}: has no list "Layers"; expected what the engine inspector prints of a whole '
            "engine as JSON"
        )
        raise EngineError(msg)
    layers = tuple(_layer(one, nodes) for one in found)
    if layers and not any(layer.nodes for layer in layers):
        msg = (
            f"{origin}: none of its {len(layers)} layers names a node of this graph; expected the "
            "engine of the same graph of the same bundle, built with detailed verbosity"
        )
        raise EngineError(msg)
    return layers


def inspector_remarks(layers: tuple[ExplainedLayer, ...]) -> tuple[str, ...]:
    """What the inspector left out, in words."""
    counts: dict[str, int] = {}
    for layer in layers:
        for what in layer.missing:
            counts[what] = counts.get(what, 0) + 1
    return tuple(
        f"the inspector does not say the {what} of {count} of {len(layers)} layers"
        for what, count in counts.items()
    )


def _layer(found: dict[str, Any] | str, nodes: GraphNodes) -> ExplainedLayer:
    fields: dict[str, Any] = {"Name": found} if isinstance(found, str) else found
    name = str(fields.get("Name", ""))
    metadata = str(fields.get("Metadata", ""))
    in_metadata = nodes_of_metadata(metadata)
    of_name, is_stretch = _nodes_of_name(name, nodes)
    names = in_metadata or of_name
    outputs = tuple(_type(tensor) for tensor in _tensors(fields, "Outputs"))
    kind, tactic = str(fields.get("LayerType", "")), str(fields.get("TacticName", ""))
    known = {
        "type": kind,
        "ONNX nodes": names,
        "precision": outputs and all(outputs),
        "tactic": tactic,
    }
    return ExplainedLayer(
        layer=name,
        kind=kind,
        nodes=names,
        operators=nodes.operators(names),
        modules=nodes.modules(names),
        is_stretch=is_stretch and not in_metadata,
        outputs=outputs,
        tactic=tactic,
        missing=tuple(what for what, value in known.items() if not value),
    )


def _nodes_of_name(name: str, nodes: GraphNodes) -> tuple[tuple[str, ...], bool]:
    """Nodes in the name of a layer: joined by " + ", or the ends of a region."""
    region = _REGION.search(name)
    if region is not None:
        ends = tuple(dict.fromkeys(end for end in region.groups() if end in nodes))
        return ends, len(ends) > 1
    parts = (part.strip() for part in name.split(" + "))
    return tuple(dict.fromkeys(part for part in parts if part in nodes)), False


def _tensors(fields: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = fields.get(key, [])
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _type(tensor: dict[str, Any]) -> str:
    """Numpy's name of a tensor's type; "" if nothing says it."""
    for key in _FORMATS:
        text = str(tensor.get(key, "")).lower()
        for pattern, name in _TYPES.items():
            if re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", text):
                return name
    return ""
