"""Runs calibration data through a bundle once and gathers statistics of values in its graphs."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from vlmport.api.collect_backend import Accumulators, ProbedBackend, probed_graphs
from vlmport.api.collect_checks import check_graphs, check_samples
from vlmport.api.collect_state import digests, load_state, save_state
from vlmport.api.linked_bundle import folder_beside
from vlmport.api.parity_emulation import emulated_bundle
from vlmport.calibration.accumulate import ValueAccumulator, merged_probes
from vlmport.errors import CalibrationError, VlmportError
from vlmport.manifest import load_manifest, verify_files
from vlmport.runtime import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.api.progress import Progress
    from vlmport.calibration.probed_graph import ProbedGraph, ProbedValue
    from vlmport.calibration.samples import CalibrationSample
    from vlmport.calibration.statistics import Probe, Statistics, ValueStatistics
    from vlmport.contract import Manifest

__all__ = ["CollectOptions", "collect"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How data is collected.

    Attributes:
        new_tokens: tokens of an answer to decode at most, so that decode steps count too.
        state_file: where statistics are kept, so that a stopped run goes on and a finished one is
            not repeated; None for nowhere. Further groups of probes (see `collect`) have files of
            the same name with ".2", ".3", .. behind it.
        state_seconds: least time between two writings of that file, which may take hundreds of MB.
        block_samples: the file is written between blocks of as many samples; their activations
            enter second moments together, since each time reads and writes the whole sums.
        max_probe_bytes: values that the decoder may give out in one run of a causal prompt.
        max_second_moment_bytes: second moments that are in memory at a time.
        threads: worker threads of each session; None for the cores that this process may use.
        verify: whether every file's digest is checked, which reads the whole bundle once.
    """

    new_tokens: int = 16
    state_file: Path | None = None
    state_seconds: float = 60.0
    block_samples: int = 8
    max_probe_bytes: int = 256 * _MIB
    max_second_moment_bytes: int = 1024 * _MIB
    threads: int | None = None
    verify: bool = True


def collect(
    bundle: Path,
    probes: Mapping[str, Sequence[Probe]],
    samples: Sequence[CalibrationSample],
    options: CollectOptions,
    progress: Progress,
) -> Statistics:
    """Asks a bundle every question, as the runtime would, and watches values in its graphs.

    Graphs see their true inputs: pixels, features, embeddings with image features in place, and a
    cache that fills with the answer. Activations are dropped after each run. If the second moments
    of all probes exceed `max_second_moment_bytes`, probes are split into groups and the data runs
    once a group; those of finished groups lie in a file and are mapped into memory.

    Args:
        bundle: of any precision; bfloat16 is emulated in float32, as for parity.
        probes: graph name -> probes; several of one value are joined.
        samples: questions.
        options: see `CollectOptions`.
        progress: advances by one a sample.

    Returns:
        Graph name -> value name -> statistics; arrays must not be written to.

    Raises:
        BundleError: if the bundle is missing or damaged.
        CalibrationError: if a probe, a sample or the state file cannot be used, if activations are
            not finite (named by PyTorch module and sample), or if a probed value was never
            computed.
    """
    manifest = load_manifest(bundle)
    verify_files(bundle, manifest, hashes=options.verify)
    check_graphs(probes, manifest)
    joined = {graph: merged_probes(of_graph) for graph, of_graph in probes.items() if of_graph}
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    with ExitStack() as stack:
        source = bundle
        if manifest.precision == "bfloat16":
            emulated = tempfile.TemporaryDirectory(prefix=".vlmport.", dir=folder_beside(bundle))
            source = Path(stack.enter_context(emulated))
            manifest = emulated_bundle(bundle, source)
        graphs = probed_graphs(source, manifest, joined)
        groups = _groups(graphs, options.max_second_moment_bytes)
        run = _Run(source, manifest, tokenizer, samples, options, progress)
        run.check(joined)
        fits = digests(bundle, joined, samples, _numbers(options))
        files = _state_files(options.state_file, len(groups), stack)
        found = [
            run.group(graphs, group, fits, path, f"{index} of {len(groups)}")
            for index, (group, path) in enumerate(zip(groups, files, strict=True), start=1)
        ]
    return _joined(joined, found)


@dataclass(frozen=True, slots=True)
class _Run:
    bundle: Path
    manifest: Manifest
    tokenizer: Tokenizer
    samples: Sequence[CalibrationSample]
    options: CollectOptions
    progress: Progress

    def check(self, probes: Mapping[str, Sequence[Probe]]) -> None:
        """See `check_samples`; the graphs are not opened for it."""
        backend = ProbedBackend(self.bundle, self.manifest, {}, {}, 0)
        check_samples(
            self.samples, probes, VisionLanguageModel(self.manifest, self.tokenizer, backend)
        )

    def group(
        self,
        graphs: Mapping[str, ProbedGraph],
        group: Mapping[str, frozenset[str]],
        fits: Mapping[str, str],
        path: Path | None,
        number: str,
    ) -> Statistics:
        """Collects the values of one group."""
        is_only = number == "1 of 1"
        chosen = {name: graphs[name].only(values) for name, values in group.items()}
        start, done = load_state(path, fits, mapped=False) if path else ({}, 0)
        accumulators = {
            name: {
                value.probe.value: ValueAccumulator(
                    value.probe, value.words, start.get(name, {}).get(value.probe.value)
                )
                for value in graph.values
            }
            for name, graph in chosen.items()
        }
        if done < len(self.samples):
            self._ask(chosen, accumulators, done, path, fits, "" if is_only else f", {number}")
        if is_only or path is None:
            return _statistics(accumulators)
        return load_state(path, fits, mapped=True)[0]

    def _ask(
        self,
        graphs: Mapping[str, ProbedGraph],
        accumulators: Accumulators,
        done: int,
        path: Path | None,
        fits: Mapping[str, str],
        which: str,
    ) -> None:
        options = self.options
        backend = ProbedBackend(
            self.bundle,
            self.manifest,
            graphs,
            accumulators,
            options.max_probe_bytes,
            options.threads,
        )
        model = VisionLanguageModel(self.manifest, self.tokenizer, backend)
        self.progress.start(f"Collecting activations{which}", len(self.samples))
        self.progress.advance(done)
        written = time.monotonic()
        for index, sample in enumerate(self.samples[done:], start=done + 1):
            _ask_one(model, sample, options.new_tokens)
            is_last = index == len(self.samples)
            if is_last or index % options.block_samples == 0:
                # In every run, saved or not: going on from here must give the same sums.
                statistics = _statistics(accumulators)
                is_due = time.monotonic() - written >= options.state_seconds
                if path is not None and (is_due or is_last):
                    save_state(path, statistics, fits, index)
                    written = time.monotonic()
            self.progress.advance(1)
        self.progress.finish()


def _numbers(options: CollectOptions) -> tuple[int, ...]:
    """What of the options the statistics follow from, to the last bit."""
    return (
        options.new_tokens,
        options.block_samples,
        options.max_probe_bytes,
        options.max_second_moment_bytes,
    )


def _ask_one(model: VisionLanguageModel, sample: CalibrationSample, new_tokens: int) -> None:
    try:
        model.generate(
            prompt=sample.prompt,
            images=sample.images,
            max_new_tokens=sample.new_tokens or new_tokens,
        )
    except VlmportError as error:
        msg = f"{sample.name}: {error}"
        raise CalibrationError(msg) from error


def _groups(graphs: Mapping[str, ProbedGraph], most_bytes: int) -> list[dict[str, frozenset[str]]]:
    """Graph name -> names of its values, for each time that the data runs.

    Second moments fill groups in the order of computation; a single one that is larger than the
    limit is alone in its group. All other values are in the first group.
    """
    groups: list[dict[str, set[str]]] = [{}]
    filled = 0
    for graph, probed in graphs.items():
        for value in probed.values:
            needed = _second_moment_bytes(value)
            if needed and filled and filled + needed > most_bytes:
                groups.append({})
                filled = 0
            filled += needed
            target = groups[-1] if needed else groups[0]
            target.setdefault(graph, set()).add(value.probe.value)
    return [{name: frozenset(values) for name, values in group.items()} for group in groups]


def _second_moment_bytes(value: ProbedValue) -> int:
    if not value.probe.second_moment:
        return 0
    if value.channels is None:
        msg = (
            f"{value.words}: a second moment is asked for, and how many channels the value has is "
            "not known before it is computed; expected the input of a layer"
        )
        raise CalibrationError(msg)
    return 4 * value.channels**2


def _state_files(wanted: Path | None, groups: int, stack: ExitStack) -> list[Path | None]:
    """One file a group; several groups without a file of the user's get temporary ones.

    What is mapped into memory stays readable when these are deleted.
    """
    if wanted is None and groups == 1:
        return [None]
    if wanted is None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vlmport."))
        wanted = Path(folder) / "statistics.safetensors"
    return [
        wanted if index == 0 else wanted.with_name(f"{wanted.name}.{index + 1}")
        for index in range(groups)
    ]


def _statistics(accumulators: Accumulators) -> dict[str, dict[str, ValueStatistics]]:
    return {
        graph: {value: accumulator.statistics() for value, accumulator in of_graph.items()}
        for graph, of_graph in accumulators.items()
    }


def _joined(
    probes: Mapping[str, Sequence[Probe]], groups: Sequence[Statistics]
) -> dict[str, dict[str, ValueStatistics]]:
    """All groups' values in the order of the probes.

    Raises:
        CalibrationError: if a value was never computed.
    """
    joined: dict[str, dict[str, ValueStatistics]] = {}
    for graph, of_graph in probes.items():
        found = {name: one for group in groups for name, one in group.get(graph, {}).items()}
        joined[graph] = {probe.value: found[probe.value] for probe in of_graph}
        unseen = [value for value, one in joined[graph].items() if one.positions == 0]
        if unseen:
            msg = (
                f"{graph}: the calibration data never computed {len(unseen)} of {len(found)} "
                f"values ({unseen[0]!r} is the first); expected data that reaches the graph; "
                "add samples that do, or leave the graph as it is"
            )
            raise CalibrationError(msg)
    return joined
