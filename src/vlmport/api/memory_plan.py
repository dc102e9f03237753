"""How much memory of a GPU the engines of a bundle will need, told before they are built."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from vlmport.contract_engines import SELECT_GREEDY, SELECT_SAMPLED
from vlmport.errors import EngineError
from vlmport.graphs.engine_source import engine_source, selection_sources
from vlmport.graphs.live_memory import live_peak
from vlmport.runtime.device.sizes import itemsize
from vlmport.runtime.engines.profiles import check_options, graph_profiles

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.contract import Manifest
    from vlmport.contract_engines import BuildOptions, EngineProfile, EngineSource
    from vlmport.graphs.live_memory import LivePeak

__all__ = [
    "GraphMemory",
    "Memory",
    "MemoryPlan",
    "Planner",
    "ProfileMemory",
    "check_fits",
    "in_gib",
    "memory_plan_json",
]

_FIRST_CACHE_INPUT, _FIRST_CACHE_OUTPUT = 4, 1  # of the decoder
_CAPACITY = "capacity"


@dataclass(frozen=True, slots=True)
class Memory:
    """What a GPU has for the engines.

    Attributes:
        size: bytes.
        source: where this is known from, for people.
    """

    size: int
    source: str


@dataclass(frozen=True, slots=True)
class ProfileMemory:
    """What one graph needs while it runs with the largest shapes of a profile.

    Attributes:
        name: of the profile.
        size: bytes of inputs, outputs and inner values, the cache and the weights left out. An
            upper estimate: every value of the graph counts that a fused kernel would not store,
            but attention scores count only where attention is decomposed.
        score_bytes: attention scores among them.
        at: the node at which most is alive.
    """

    name: str
    size: int
    score_bytes: int
    at: str


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """What the engine of one graph needs.

    Attributes:
        graph: its name.
        weight_bytes: of its weights, as they lie in the bundle.
        profiles: one for each optimization profile.
    """

    graph: str
    weight_bytes: int
    profiles: tuple[ProfileMemory, ...]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the engines of a bundle need.

    Attributes:
        precision: of the bundle.
        options: what the engines are to be built for.
        graphs: every engine.
        weight_bytes: of all engines.
        cache_bytes_per_token: keys and values of all layers.
        cache_bytes: of max_batch rows of max_length tokens, allocated from the start.
        activation_bytes: of the engine and profile that needs the most: engines run one after the
            other in one block.
        buffer_bytes: a decode step's embeddings and logits, and what choosing tokens keeps.
        total_bytes: all of it; the CUDA context and TensorRT's own kernels come on top.
        available: what the GPU has; None if that is not known.
        advice: what would fit; empty if it fits or nothing is known.
    """

    precision: str
    options: BuildOptions
    graphs: tuple[GraphMemory, ...]
    weight_bytes: int
    cache_bytes_per_token: int
    cache_bytes: int
    activation_bytes: int
    buffer_bytes: int
    total_bytes: int
    available: Memory | None
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None if nothing is known of a GPU."""
        return None if self.available is None else self.total_bytes <= self.available.size


class Planner:
    """Plans a bundle's engines for one or more sets of options.

    Args:
        bundle: its folder.
        manifest: its manifest.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._bundle = bundle
        self._graphs: dict[int, list[EngineSource]] = {}  # by max_length
        self._selecting = selection_sources(bundle, manifest.dimensions.vocab_size)
        self._peaks: dict[tuple[str, tuple[tuple[str, int], ...]], LivePeak] = {}

    def plan(self, options: BuildOptions, available: Memory | None = None) -> MemoryPlan:
        """What engines of these options need.

        Raises:
            EngineError: if the options are out of range.
            GraphError: if the size of a graph's values cannot be told.
        """
        check_options(self.manifest, options)
        manifest = self.manifest
        sources = (*self._bundle_sources(options.max_length), *self._selecting)
        graphs = [self._graph(source, options) for source in sources]
        a_token = manifest.kv_layout.bytes_per_token(itemsize(manifest.kv_layout.dtype))
        weights = sum(graph.weight_bytes for graph in graphs)
        cache = a_token * options.max_batch * options.max_length
        activations = max(one.size for graph in graphs for one in graph.profiles)
        buffers = self._step_bytes(options) + sum(
            self._peak(source, profile, options).port_bytes
            for source in self._selecting
            for profile in graph_profiles(manifest, source, options)
        )
        return MemoryPlan(
            precision=manifest.precision_words,
            options=options,
            graphs=tuple(graphs),
            weight_bytes=weights,
            cache_bytes_per_token=a_token,
            cache_bytes=cache,
            activation_bytes=activations,
            buffer_bytes=buffers,
            total_bytes=weights + cache + activations + buffers,
            available=available,
        )

    def _bundle_sources(self, max_length: int) -> list[EngineSource]:
        if max_length not in self._graphs:
            self._graphs[max_length] = [
                engine_source(self._bundle / graph.file, graph.name, max_length)
                for graph in self.manifest.graphs
            ]
        return self._graphs[max_length]

    def _step_bytes(self, options: BuildOptions) -> int:
        sizes = self.manifest.dimensions
        embedding = sizes.hidden_size * itemsize(self.manifest.precision)
        return options.max_batch * (embedding + sizes.vocab_size * itemsize("float32"))

    def _graph(self, source: EngineSource, options: BuildOptions) -> GraphMemory:
        weights = 0
        if source.graph not in (SELECT_GREEDY, SELECT_SAMPLED):
            weights = self.manifest.graph(source.graph).parameter_bytes
        profiles = []
        for profile in graph_profiles(self.manifest, source, options):
            peak = self._peak(source, profile, options)
            at = f"{peak.node} ({peak.operator})" if peak.operator else "its ports"
            profiles.append(ProfileMemory(profile.name, peak.total_bytes, peak.score_bytes, at))
        return GraphMemory(source.graph, weights, tuple(profiles))

    def _peak(
        self, source: EngineSource, profile: EngineProfile, options: BuildOptions
    ) -> LivePeak:
        lengths = _largest(source, profile) | {_CAPACITY: options.max_length}
        key = source.graph, tuple(sorted(lengths.items()))
        if key not in self._peaks:
            outside = self._cache_ports() if source.graph == "decoder" else set[str]()
            self._peaks[key] = live_peak(
                _model(source), source.graph, lengths, outside, _is_decomposed
            )
        return self._peaks[key]

    def _cache_ports(self) -> set[str]:
        decoder = self.manifest.graph("decoder")
        ports = (*decoder.inputs[_FIRST_CACHE_INPUT:], *decoder.outputs[_FIRST_CACHE_OUTPUT:])
        return {port.name for port in ports}


def check_fits(plan: MemoryPlan) -> None:
    """Refuses engines that the GPU has no room for.

    Raises:
        EngineError: says what they need, what is there, and what would fit.
    """
    if plan.fits is not False or plan.available is None:
        return
    options = plan.options
    advice = "; ".join(plan.advice) or "no smaller options fit: use a GPU with more memory"
    msg = (
        f"GPU memory: {in_gib(plan.total_bytes)} needed for max_batch {options.max_batch} and "
        f"max_length {options.max_length} (weights {in_gib(plan.weight_bytes)}, cache "
        f"{in_gib(plan.cache_bytes)}, activations up to {in_gib(plan.activation_bytes)}); "
        f"{in_gib(plan.available.size)} {plan.available.source}; {advice}"
    )
    raise EngineError(msg)


def in_gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def memory_plan_json(plan: MemoryPlan) -> str:
    """The plan as one JSON object."""
    return json.dumps({**asdict(plan), "fits": plan.fits})


def _model(source: EngineSource) -> ir.Model:
    if source.path.is_file():
        return ir.load(source.path)
    return ir.from_proto(onnx.load_model_from_string(source.model))  # it lies in no file


def _largest(source: EngineSource, profile: EngineProfile) -> dict[str, int]:
    """Axis -> its largest length in a profile."""
    largest = {one.port: one.largest for one in profile.ranges}
    return {
        axis: length
        for port in source.inputs
        if port.name in largest
        for axis, length in zip(port.shape, largest[port.name], strict=True)
        if isinstance(axis, str)
    }


def _is_decomposed(node: ir.Node) -> bool:
    """Whether TensorRT has no kernel: it has none for single precision, and none for a soft cap."""
    query = node.inputs[0]
    cap = node.attributes.get("softcap")
    has_cap = cap is not None and cap.as_float() != 0.0
    return has_cap or (query is not None and query.dtype == ir.DataType.FLOAT)
