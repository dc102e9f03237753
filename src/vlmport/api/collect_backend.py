"""Runs a bundle as the runtime does and hands inner values of its graphs to accumulators."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.calibration.probed_graph import ProbedGraph, probed_graph
from vlmport.runtime.backends.host import HostBackend
from vlmport.runtime.backends.onnxruntime import open_session
from vlmport.runtime.backends.onnxruntime_memory import host_value
from vlmport.runtime.kv_cache import GrowingCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.calibration.accumulate import ValueAccumulator
    from vlmport.calibration.statistics import Probe
    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import SlotDecoding

__all__ = ["Accumulators", "ProbedBackend", "probed_graphs"]

# Graph name -> value name -> what gathers its statistics.
Accumulators = dict[str, dict[str, "ValueAccumulator"]]

# The runtime's own length of a piece of a causal prompt.
_LONGEST_PIECE = 512
# Tokens of the run that measures how much a token gives out.
_MEASURED_TOKENS = 8


def probed_graphs(
    bundle: Path, manifest: Manifest, probes: Mapping[str, Sequence[Probe]]
) -> dict[str, ProbedGraph]:
    """The graphs with probes, by name; see `probed_graph`."""
    return {
        graph: probed_graph(bundle / manifest.graph(graph).file, graph, wanted)
        for graph, wanted in probes.items()
        if wanted
    }


@dataclass(frozen=True, slots=True)
class _Session:
    """An opened graph and what is probed in it."""

    session: Any  # onnxruntime ships no types
    graph: ProbedGraph
    accumulators: Mapping[str, ValueAccumulator]

    @property
    def given_out(self) -> list[str]:
        """Probed values that the graph computes, in the order of computation."""
        return [value.probe.value for value in self.graph.values if not value.is_input]

    def take(
        self,
        arrays: Mapping[str, NDArray[Any]],
        but: frozenset[str] = frozenset(),
        *,
        begins: bool = False,
    ) -> None:
        """Hands values on, all but those named; positions of a tile's padding do not count.

        Args:
            arrays: inputs and computed values by name.
            but: values that are passed over.
            begins: whether a sequence begins here.
        """
        mask = arrays.get("patch_mask")
        for value in self.graph.values:
            if value.probe.value in but:
                continue
            array = arrays[value.probe.value]
            valid = None if mask is None else value.valid_positions(array.shape, mask)
            self.accumulators[value.probe.value].update(array, valid, begins=begins)


@dataclass(frozen=True, slots=True)
class _PrefillForm:
    """How the decoder takes in causal prompts.

    Attributes:
        piece: tokens that run together.
        of_last_token: values of the piece's last token alone, such as the head's input; only the
            last piece's are those of a decoding.
    """

    piece: int
    of_last_token: frozenset[str]


class ProbedBackend(HostBackend):
    """A `vlmport.runtime.backends.base.Backend` with ONNX Runtime on the CPU.

    Args:
        bundle: folder of the bundle.
        manifest: its manifest.
        graphs: of `probed_graphs`.
        accumulators: for every value that is probed.
        max_probe_bytes: how much the decoder may give out in one run; prompts run in pieces of as
            many tokens, at least one.
        threads: worker threads of each session; None for the cores that this process may use.
    """

    name = "onnxruntime, probed"

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        graphs: Mapping[str, ProbedGraph],
        accumulators: Accumulators,
        max_probe_bytes: int,
        threads: int | None = None,
    ) -> None:
        super().__init__(manifest)
        self._bundle = bundle
        self._graphs = graphs
        self._accumulators = accumulators
        self._max_probe_bytes = max_probe_bytes
        self._threads = threads
        self._sessions: dict[str, _Session] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph that has no cache; see `Backend.run`."""
        spec = self._manifest.graph(graph)
        opened = self._session(graph)
        fed = {port.name: inputs[port.name] for port in spec.inputs}
        names = list(dict.fromkeys([*(port.name for port in spec.outputs), *opened.given_out]))
        computed = dict(zip(names, opened.session.run(names, fed), strict=True))
        opened.take({**fed, **computed})
        return {port.name: computed[port.name] for port in spec.outputs}

    def start(self, batch: int, max_length: int) -> ProbedDecoding:
        """Makes an empty cache; see `Backend.start`. One row only: it has no padding."""
        if batch != 1:
            raise ValueError(f"batch: found {batch}; activations are collected row by row")
        cache = GrowingCache(self._manifest.kv_layout, batch, max_length)
        return ProbedDecoding(self, self._session("decoder"), self._manifest, cache)

    def start_slots(self, num_slots: int, cache_tokens: int | None) -> SlotDecoding:
        """Refuses, as `start` does with more than one row; see `Backend.start_slots`."""
        raise ValueError(f"slots: found {num_slots}; activations are collected row by row")

    def _session(self, name: str) -> _Session:
        """Opens a graph when it is first needed."""
        if name not in self._sessions:
            graph = self._graphs.get(name)
            content = graph.content if graph else None
            path = self._bundle / self._manifest.graph(name).file
            opened = open_session(path, self._threads, self._manifest.precision, content)
            accumulators = self._accumulators.get(name, {})
            self._sessions[name] = _Session(opened, graph or ProbedGraph(b"", ()), accumulators)
        return self._sessions[name]

    @functools.cached_property
    def prefill_form(self) -> _PrefillForm:
        """How prompts run: the same in every process, since it does not follow from the data.

        A run on zeros tells it for values whose shape the graph leaves open, too.
        """
        opened, tokens = self._session("decoder"), _MEASURED_TOKENS
        lengths = {"batch": 1, "sequence_length": tokens, "capacity": tokens}
        fed = {
            port.name: np.zeros(
                [dim if isinstance(dim, int) else lengths[dim] for dim in port.shape], port.dtype
            )
            for port in self._manifest.graph("decoder").inputs
        }
        fed["position_ids"][:] = np.arange(tokens) + self._manifest.attention.first_position
        fed["valid_lengths"][:] = tokens
        names = opened.given_out
        arrays = opened.session.run(names, fed) if names else []
        needed = sum(array.nbytes for array in arrays) // tokens
        room = self._max_probe_bytes // max(needed, 1)
        channels = {v.probe.value: v.probe.channel_axis for v in opened.graph.values}
        return _PrefillForm(
            piece=min(max(room, 1), _LONGEST_PIECE),
            of_last_token=frozenset(
                name
                for name, array in zip(names, arrays, strict=True)
                if array.ndim and array.size == array.shape[channels[name]]
            ),
        )


class ProbedDecoding:
    """A `vlmport.runtime.backends.base.Decoding` of one sequence, its cache bound in place."""

    def __init__(
        self,
        backend: ProbedBackend,
        decoder: _Session,
        manifest: Manifest,
        cache: GrowingCache,
    ) -> None:
        self._backend = backend
        self._decoder = decoder
        self._manifest = manifest
        self._cache = cache
        self._length = 0
        self._past = manifest.past_ports
        self._present = manifest.present_ports

    def prefill(
        self, inputs_embeds: NDArray[np.floating[Any]], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the prompt, a causal one in pieces; see `Decoding.prefill`."""
        total = int(lengths[0])
        whole = self._manifest.attention.prompt == "bidirectional"
        form = self._backend.prefill_form
        piece = total if whole else form.piece
        for start in range(0, total - piece, piece):
            self._run(inputs_embeds[:, start : start + piece], form.of_last_token)
        return self._run(inputs_embeds[:, self._length : total])

    def step(self, token_ids: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Appends one token; see `Decoding.step`."""
        assert active.all()
        embeds = self._backend.run("embed_tokens", {"input_ids": token_ids[:, None]})
        return self._run(embeds["inputs_embeds"])

    def close(self) -> None:
        """Frees the cache; see `Decoding.close`."""
        self._cache.arrays.clear()

    def _run(
        self, inputs_embeds: NDArray[np.floating[Any]], but: frozenset[str] = frozenset()
    ) -> NDArray[np.float32]:
        start, tokens = self._length, inputs_embeds.shape[1]
        self._length += tokens
        self._cache.reserve(self._length, start)
        positions = np.arange(start, self._length, dtype=np.int64)[None]
        logits = np.empty((1, self._manifest.dimensions.vocab_size), np.float32)
        fed = {
            "inputs_embeds": np.ascontiguousarray(inputs_embeds),
            "position_ids": positions + self._manifest.attention.first_position,
            "write_indices": np.array([start], np.int64),
            "valid_lengths": np.array([self._length], np.int64),
        }
        binding = self._decoder.session.io_binding()
        probed = [name for name in self._decoder.given_out if name != "logits"]
        for name in probed:
            binding.bind_output(name, "cpu")  # first, so that they are the first of get_outputs()
        binding.bind_ortvalue_output("logits", host_value(logits))
        for name, array in fed.items():
            binding.bind_ortvalue_input(name, host_value(array))
        for past, present, array in zip(self._past, self._present, self._cache.arrays, strict=True):
            value = host_value(array)
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        self._decoder.session.run_with_iobinding(binding)
        given = binding.get_outputs()[: len(probed)]
        arrays = {name: value.numpy() for name, value in zip(probed, given, strict=True)}
        self._decoder.take({**fed, **arrays, "logits": logits}, but, begins=start == 0)
        return logits
