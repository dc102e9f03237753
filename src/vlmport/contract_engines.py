"""What an engine.json says of the TensorRT engines that were built from a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CAPTURED_GRAPHS",
    "ENGINES_FOLDER",
    "ENGINES_NAME",
    "ENGINES_SCHEMA_VERSION",
    "SELECT_GREEDY",
    "SELECT_SAMPLED",
    "AttentionLayer",
    "AttentionNode",
    "BuildOptions",
    "Engine",
    "EnginePort",
    "EngineProfile",
    "EngineSet",
    "EngineSource",
    "PortRange",
    "TensorRTName",
]

ENGINES_FOLDER = "engines"  # of a bundle; in it <backend>-<version>-<capability>/
ENGINES_NAME = "engine.json"
ENGINES_SCHEMA_VERSION = 1
# Engines that belong to no graph of the bundle: they choose the next token from the logits.
SELECT_GREEDY = "select_greedy"
SELECT_SAMPLED = "select_sampled"
# What a decode step runs, which is captured into a CUDA graph.
CAPTURED_GRAPHS = ("embed_tokens", "decoder", SELECT_GREEDY, SELECT_SAMPLED)

TensorRTName = Literal["tensorrt", "tensorrt-rtx"]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class AttentionNode:
    """What an Attention node of a graph means; TensorRT's parser keeps only a part of it.

    Attributes:
        name: of the node.
        causal: whether a token sees only those before it; the last query sees the last valid key.
        lengths: name of the tensor int64 [batch] that says how many keys are valid
            (nonpad_kv_seqlen); "" if all are.
        mask: name of the mask tensor; "" if there is none.
    """

    __pydantic_config__ = _STRICT
    name: str
    causal: bool
    lengths: str
    mask: str


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What an attention layer of the network that was built does.

    Attributes:
        layer: its name in the network.
        node: the ONNX node that it came from.
        dtype: numpy's name of the element type of the queries.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values.
        head_dim: length of one head.
        masking: "none": every query sees every valid key. "lower_right": causal, aligned to the
            last valid key. "tensor": a mask tensor says it.
        lengths: name of the network tensor int32 [batch] that bounds the keys; "" for no bound.
        fused: whether TensorRT has one kernel for it; else it is decomposed.
        reason: why it is decomposed; "" if it is not.
    """

    __pydantic_config__ = _STRICT
    layer: str
    node: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    masking: Literal["none", "lower_right", "tensor"]
    lengths: str
    fused: bool
    reason: str


@dataclass(frozen=True, slots=True)
class EnginePort:
    """An input or output of an engine.

    Attributes:
        name: the graph's.
        dtype: numpy's name of the element type; "bfloat16" is ml_dtypes'.
        shape: one entry an axis: a fixed length, or the name of an axis with a range.
        aliases: for an output that is written in place, the input whose address it must have;
            "" for every other port.
    """

    __pydantic_config__ = _STRICT
    name: str
    dtype: str
    shape: tuple[int | str, ...]
    aliases: str = ""


@dataclass(frozen=True, slots=True)
class EngineSource:
    """A graph as TensorRT's parser takes it, and what the parser does not keep of it.

    Attributes:
        graph: the bundle's graph, or SELECT_GREEDY or SELECT_SAMPLED.
        model: serialized ONNX; large weights are external.
        path: where the graph lies, or would lie; external weights are found from there.
        inputs: in the graph's order.
        outputs: in the graph's order.
        attention: what its Attention nodes mean.
        cache_updates: number of its TensorScatter nodes.
        weight_files: names of the files with external weights, relative to `path`.
    """

    graph: str
    model: bytes
    path: Path
    inputs: tuple[EnginePort, ...]
    outputs: tuple[EnginePort, ...]
    attention: tuple[AttentionNode, ...]
    cache_updates: int
    weight_files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PortRange:
    """Which shapes of one input a profile allows: [smallest, usual, largest] of each axis."""

    __pydantic_config__ = _STRICT
    port: str
    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """An optimization profile; its index is its place in `Engine.profiles`.

    Attributes:
        name: "default", or of a decoder "prefill" and "decode".
        ranges: of every input with a dynamic axis.
        activation_bytes: device memory that a context needs for it; None if no device was there to
            ask.
    """

    __pydantic_config__ = _STRICT
    name: Literal["default", "prefill", "decode"]
    ranges: tuple[PortRange, ...]
    activation_bytes: int | None


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    Attributes:
        graph: the bundle's graph, or SELECT_GREEDY or SELECT_SAMPLED.
        file: name beside engine.json.
        size: bytes.
        sha256: of the file.
        source_sha256: of the graph, its weights and the options that it was built with; equal ones
            need no new engine.
        inputs: in the graph's order.
        outputs: in the graph's order.
        profiles: in the order of their indices.
        attention: every attention layer.
        build_seconds: without parsing the weights' file again.
        warnings: what TensorRT said and is not known to be harmless.
    """

    __pydantic_config__ = _STRICT
    graph: str
    file: str
    size: int
    sha256: str
    source_sha256: str
    inputs: tuple[EnginePort, ...]
    outputs: tuple[EnginePort, ...]
    profiles: tuple[EngineProfile, ...]
    attention: tuple[AttentionLayer, ...]
    build_seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What engines are built for.

    Attributes:
        backend: the module that builds and runs them.
        max_batch: most rows that are decoded together.
        max_length: rows of the cache: most tokens of one sequence; at most the bundle's.
        prefill_chunk: most tokens of a prompt that the decoder takes in one call. A prompt whose
            tokens see each other both ways must fit in one.
        max_images: most images (or tiles) that the vision encoder takes in one call.
        compute_capabilities: targets ("8.9"); empty for engines of TensorRT-RTX that run on 8.0 and
            later, and for those of the full TensorRT, which builds for the GPU at hand.
        masking: "lengths" gives attention layers the valid lengths; "mask" gives them an explicit
            mask tensor.
        refit: whether weights can be replaced later.
        strip_weights: whether the engine is written without its weights, which are read from the
            bundle when it is opened.
    """

    __pydantic_config__ = _STRICT
    backend: TensorRTName
    max_batch: int
    max_length: int
    prefill_chunk: int
    max_images: int
    compute_capabilities: tuple[str, ...] = ()
    masking: Literal["lengths", "mask"] = "lengths"
    refit: bool = False
    strip_weights: bool = False


@dataclass(frozen=True, slots=True)
class EngineSet:
    """All engines of a bundle for one version of TensorRT and one kind of GPU.

    Attributes:
        schema_version: of this structure; a reader rejects a newer one.
        version: of TensorRT; no other one can load the engines.
        capability: what they run on: "sm89", several joined by "+", or "portable".
        device: name of the GPU that they were built on; "" if there was none.
        graphs_sha256: of the bundle's graphs and weights (`vlmport.manifest.graphs_digest`).
        options: what they were built for.
        engines: one for each graph of the bundle and for choosing tokens.
        tools: tool name -> version.
    """

    __pydantic_config__ = _STRICT
    schema_version: int
    version: str
    capability: str
    device: str
    graphs_sha256: str
    options: BuildOptions
    engines: tuple[Engine, ...]
    tools: dict[str, str]

    def engine(self, graph: str) -> Engine:
        """The engine of a graph; the reader has checked that the needed ones exist."""
        return next(engine for engine in self.engines if engine.graph == graph)

    def has_engine(self, graph: str) -> bool:
        """Whether there is one for an optional graph."""
        return any(engine.graph == graph for engine in self.engines)
