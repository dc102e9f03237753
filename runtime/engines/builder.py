"""Builds one engine: a graph is parsed, completed, checked, built and written."""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from vlmport.contract_engines import CAPTURED_GRAPHS, Engine
from vlmport.errors import EngineError
from vlmport.runtime.engines.attention import complete_attention
from vlmport.runtime.engines.attention_check import check_attention
from vlmport.runtime.engines.attention_kernels import KernelFinder
from vlmport.runtime.engines.attention_layers import attention_layers
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.network import (
    cache_aliases,
    check_nothing_is_ignored,
    parse_network,
)
from vlmport.runtime.engines.plan_file import PlanFile, plan_writer
from vlmport.runtime.engines.ports import check_network_ports, with_aliases
from vlmport.runtime.engines.progress import PERCENT, BuildTally, build_monitor
from vlmport.runtime.engines.shapes import dims

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import tensorrt as trt

    from vlmport.contract_engines import (
        AttentionLayer,
        BuildOptions,
        EnginePort,
        EngineProfile,
        EngineSource,
    )
    from vlmport.runtime.engines.bindings import Bindings
    from vlmport.runtime.engines.log import EngineLog
    from vlmport.runtime.engines.progress import BuildWatch
    from vlmport.runtime.engines.target import Target
    from vlmport.runtime.engines.timing_cache import TimingCache

__all__ = ["BuildCancelledError", "EngineBuilder"]

_NO_KERNEL = "not supported by a dedicated kernel"
_NEEDS_GPU = "CHECK(status == CUDA_SUCCESS)"  # TensorRT-RTX 1.7 of every refittable engine


class BuildCancelledError(Exception):
    """The build was told to stop."""


@dataclass(frozen=True, slots=True)
class _Network:
    """A network that is ready to be built; the parser holds its weights."""

    definition: trt.INetworkDefinition
    parser: trt.OnnxParser
    attention: tuple[AttentionLayer, ...]
    outputs: tuple[EnginePort, ...]


class EngineBuilder:
    """Builds engines with one set of options for one kind of GPU; safe to use from threads."""

    def __init__(
        self,
        bindings: Bindings,
        options: BuildOptions,
        target: Target,
        timing_cache: TimingCache | None = None,
    ) -> None:
        self._bindings = bindings
        self._options = options
        self._target = target
        self._timing_cache = timing_cache
        self._kernels = KernelFinder(bindings, self._probe_config)

    def build(
        self,
        source: EngineSource,
        profiles: Sequence[EngineProfile],
        folder: Path,
        watch: BuildWatch,
    ) -> tuple[Engine, list[str]]:
        """Builds the engine of a graph and writes it as <graph>.engine.

        Args:
            source: the graph.
            profiles: in the order of their indices.
            folder: an existing one.
            watch: is told of the progress, and can stop the build.

        Returns:
            The engine, whose `source_sha256` is left to the caller, and what TensorRT said.

        Raises:
            EngineError: if the graph does not parse or build, or its engine would not compute what
                the graph means.
            BuildCancelledError: if it was stopped.
            OSError: if the file cannot be written.
        """
        with listening() as log:
            builder = self._bindings.Builder(engine_logger(self._bindings))
            network = self._network(builder, source, profiles, log)
            started, tally = time.monotonic(), BuildTally(watch)
            path = folder / f"{source.graph}.engine"
            try:
                plan, network = self._plan(builder, network, source, profiles, path, tally, log)
                check_nothing_is_ignored(source.graph, log)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            tally.reach(PERCENT)
            engine = Engine(
                graph=source.graph,
                file=path.name,
                size=plan.size,
                sha256=plan.sha256,
                source_sha256="",
                inputs=source.inputs,
                outputs=network.outputs,
                profiles=self._with_memory(plan, profiles),
                attention=network.attention,
                build_seconds=round(time.monotonic() - started, 3),
                warnings=log.warnings,
            )
            return engine, log.lines()

    def _network(
        self,
        builder: trt.Builder,
        source: EngineSource,
        profiles: Sequence[EngineProfile],
        log: EngineLog,
    ) -> _Network:
        bindings = self._bindings
        definition, parser = parse_network(bindings, builder, source, log, engine_logger(bindings))
        check_network_ports(definition, source)
        aliases = cache_aliases(bindings, definition, source)
        complete_attention(bindings, definition, source, self._options.masking)
        reasons = self._kernels.decompose_where_needed(definition, profiles)
        layers = check_attention(bindings, definition, source, reasons)
        return _Network(definition, parser, layers, with_aliases(source.outputs, aliases))

    def _plan(
        self,
        builder: trt.Builder,
        network: _Network,
        source: EngineSource,
        profiles: Sequence[EngineProfile],
        path: Path,
        tally: BuildTally,
        log: EngineLog,
    ) -> tuple[PlanFile, _Network]:
        """Builds; once more with decomposed attention if a kernel that was there alone is not."""
        while True:
            config = self._config(builder, source.graph, profiles, tally)
            plan = PlanFile(path)
            writer = plan_writer(self._bindings, plan)
            done = builder.build_serialized_network_to_stream(network.definition, config, writer)
            if plan.error is not None:  # TensorRT-RTX 1.7 calls that a success
                raise plan.error
            if done:
                if self._timing_cache is not None:
                    self._timing_cache.keep(config)
                return plan, network
            if tally.is_stopped:
                raise BuildCancelledError
            fused = [layer for layer in network.attention if layer.fused]
            if not fused or _NO_KERNEL not in log.reason:
                raise self._failure(source.graph, log.reason)
            network = self._decomposed(network, source)

    def _decomposed(self, network: _Network, source: EngineSource) -> _Network:
        reasons = {
            layer.layer: layer.reason or "has a kernel alone, but not in this network"
            for layer in network.attention
        }
        for layer in attention_layers(self._bindings, network.definition):
            layer.attention.decomposable = True
        checked = check_attention(self._bindings, network.definition, source, reasons)
        return replace(network, attention=checked)

    def _failure(self, graph: str, words: str) -> EngineError:
        refittable = self._options.refit or self._options.strip_weights
        if refittable and _NEEDS_GPU in words:
            return EngineError(
                f"{graph}: TensorRT does not build an engine whose weights can be replaced "
                "without a GPU; build it where one is, or leave --refit and --strip-weights out"
            )
        return EngineError(
            f"{graph}: TensorRT does not build it: {words}; "
            "another precision, smaller profiles or another compute capability may build"
        )

    def _probe_config(self, builder: trt.Builder) -> trt.IBuilderConfig:
        config = builder.create_builder_config()
        self._target.apply(self._bindings, config)
        return config

    def _config(
        self,
        builder: trt.Builder,
        graph: str,
        profiles: Sequence[EngineProfile],
        tally: BuildTally,
    ) -> trt.IBuilderConfig:
        bindings, flags = self._bindings, self._bindings.BuilderFlag
        config = self._probe_config(builder)
        config.progress_monitor = build_monitor(bindings, tally)
        config.profiling_verbosity = bindings.ProfilingVerbosity.DETAILED
        # It is on by default and would round float32 to 10 bits.
        config.clear_flag(flags.TF32)
        if graph in CAPTURED_GRAPHS and self._options.backend == "tensorrt-rtx":
            # Else an engine with large tensors allocates while it runs, which cannot be captured.
            # Other graphs may: with the flag, one with shapes that depend on data does not build.
            config.set_flag(cast("Any", flags).REQUIRE_USER_ALLOCATION)
        if self._options.refit:
            config.set_flag(flags.REFIT)
        if self._options.strip_weights:
            config.set_flag(flags.STRIP_PLAN)
        if self._timing_cache is not None:
            self._timing_cache.use(config)
        for profile in profiles:
            shapes = builder.create_optimization_profile()
            for port in profile.ranges:
                bounds = (port.smallest, port.usual, port.largest)
                least, usual, most = (dims(bindings, bound) for bound in bounds)
                shapes.set_shape(port.port, least, usual, most)
            if profile.ranges:
                config.add_optimization_profile(shapes)
        return config

    def _with_memory(
        self, plan: PlanFile, profiles: Sequence[EngineProfile]
    ) -> tuple[EngineProfile, ...]:
        """The profiles with the device memory that each needs, if a device is there to ask."""
        if not self._target.device or self._options.strip_weights:
            return tuple(profiles)
        runtime = self._bindings.Runtime(engine_logger(self._bindings))
        with (
            plan.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:  # built for another GPU than the one at hand
            return tuple(profiles)
        return tuple(
            replace(
                profile, activation_bytes=int(engine.get_device_memory_size_for_profile_v2(index))
            )
            for index, profile in enumerate(profiles)
        )
