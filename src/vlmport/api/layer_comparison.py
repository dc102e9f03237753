"""Layer by layer: how far the values in a quantized bundle's graphs are from those in float.

Both graphs get the same real inputs, those that the float bundle feeds to its own graphs. Within a
graph nothing is reset: a layer's difference includes all that its own input already brought along,
so that it says where in a graph quality is lost by the step from one layer to the next, not by the
figure of one layer alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from vlmport.api.graph_inputs import GraphInputs
from vlmport.api.linked_bundle import changed_graph
from vlmport.api.signal_noise import Signal, SignalSums
from vlmport.calibration.layers import find_layers
from vlmport.errors import ParityError
from vlmport.manifest import load_manifest
from vlmport.runtime.backends.onnxruntime import open_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vlmport.api.progress import Progress
    from vlmport.api.reference_answers import GreedyAnswer
    from vlmport.calibration.layers import Layer
    from vlmport.contract import Manifest
    from vlmport.runtime import VisionLanguageModel

__all__ = ["LayerError", "LayerTable", "compare_layers"]

# Channels of all probed values of one session: in pieces of 512 positions at most 512 MiB a side.
_MOST_CHANNELS = 1 << 18


@dataclass(frozen=True, slots=True)
class LayerError:
    """One layer's output in the quantized bundle beside that in the float bundle.

    Attributes:
        graph: name of its graph.
        layer: its name, made of those of its PyTorch modules.
        modules: the PyTorch modules whose weights it holds.
        signal: the difference, which includes what its input brought along.
    """

    graph: str
    layer: str
    modules: tuple[str, ...]
    signal: Signal


@dataclass(frozen=True, slots=True)
class LayerTable:
    """All layers, graph by graph, in the order in which they compute.

    Attributes:
        layers: those that both graphs have.
        missing: "graph: layer" for those whose output the quantized graph has not by that name.
        questions: how many were run.
        decode_steps: steps of each answer that were run behind its prompt, at most.
    """

    layers: tuple[LayerError, ...]
    missing: tuple[str, ...]
    questions: int
    decode_steps: int


@dataclass(frozen=True, slots=True)
class _Probe:
    layer: Layer
    value: str
    channel_axis: int


def compare_layers(
    float_bundle: Path,
    bundle: Path,
    model: VisionLanguageModel,
    answers: Sequence[GreedyAnswer],
    progress: Progress,
    *,
    decode_steps: int = 4,
) -> LayerTable:
    """Compares the outputs of all layers on real inputs.

    Args:
        float_bundle: folder of the bundle of higher precision.
        bundle: folder of the one that was made from it.
        model: the opened float bundle, which makes the inputs.
        answers: questions, and the tokens that the decoder is led along.
        progress: is told of each question of each pass.
        decode_steps: steps behind each prompt, with the cache that the float decoder has filled.

    Raises:
        ParityError: if a bundle computes in bfloat16, or they have different graphs, or values of
            one name and different shapes.
        BundleError: if a graph cannot be loaded.
    """
    manifests = load_manifest(float_bundle), load_manifest(bundle)
    _check_can_run(float_bundle, bundle, *manifests)
    _check_same_graphs(float_bundle, bundle, *manifests)
    inputs = GraphInputs(model, decode_steps)
    layers: list[LayerError] = []
    missing: list[str] = []
    sides = _Side(float_bundle, manifests[0]), _Side(bundle, manifests[1])
    for graph in (spec.name for spec in manifests[0].graphs):
        probes, lost = _probes(graph, *sides)
        missing += lost
        for part in _parts(probes):
            layers += _compare_part(graph, part, sides, inputs, answers, progress)
    return LayerTable(tuple(layers), tuple(missing), len(answers), decode_steps)


@dataclass(frozen=True, slots=True)
class _Side:
    bundle: Path
    manifest: Manifest

    def load(self, graph: str) -> ir.Model:
        return ir.load(self.bundle / self.manifest.graph(graph).file)

    def probed_session(self, graph: str, values: Sequence[str]) -> Any:
        """A session of the graph that also gives these values."""
        model = self.load(graph)
        outputs = {value.name for value in model.graph.outputs}
        for value in _values(model).values():
            if value.name in values and value.name not in outputs:
                model.graph.outputs.append(value)
        with changed_graph(self.bundle, model) as path:
            return open_session(path, None, self.manifest.precision)


def _check_can_run(
    float_bundle: Path, bundle: Path, float_manifest: Manifest, manifest: Manifest
) -> None:
    for folder, one in ((float_bundle, float_manifest), (bundle, manifest)):
        if one.precision == "bfloat16":
            msg = (
                f"{folder}: its graphs compute in bfloat16, for which ONNX Runtime's CPU provider "
                "has no kernels; compare layers with bundles of fp32 or fp16"
            )
            raise ParityError(msg)


def _check_same_graphs(
    float_bundle: Path, bundle: Path, float_manifest: Manifest, manifest: Manifest
) -> None:
    ports = [
        {
            graph.name: [port.name for port in (*graph.inputs, *graph.outputs)]
            for graph in one.graphs
        }
        for one in (float_manifest, manifest)
    ]
    if ports[0] != ports[1] or float_manifest.dimensions != manifest.dimensions:
        msg = (
            f"{bundle}: its graphs have other ports or sizes than those of {float_bundle}; "
            "expected the bundle that it was quantized from"
        )
        raise ParityError(msg)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs if value.name}


def _probes(graph: str, float_side: _Side, side: _Side) -> tuple[list[_Probe], list[str]]:
    probes, missing = [], []
    known = _values(side.load(graph))
    for layer in find_layers(float_side.load(graph)):
        name = str(layer.node.outputs[0].name)
        if name in known:
            probes.append(_Probe(layer, name, 1 if layer.operator == "Conv" else -1))
        else:
            missing.append(f"{graph}: {layer.name}")
    return probes, missing


def _parts(probes: Sequence[_Probe]) -> Iterator[list[_Probe]]:
    """Splits a graph's layers so that their outputs fit into memory together."""
    part: list[_Probe] = []
    channels = 0
    for probe in probes:
        if part and channels + probe.layer.out_channels > _MOST_CHANNELS:
            yield part
            part, channels = [], 0
        part.append(probe)
        channels += probe.layer.out_channels
    if part:
        yield part


def _compare_part(
    graph: str,
    probes: Sequence[_Probe],
    sides: tuple[_Side, _Side],
    inputs: GraphInputs,
    answers: Sequence[GreedyAnswer],
    progress: Progress,
) -> list[LayerError]:
    names = [probe.value for probe in probes]
    reference, found = (side.probed_session(graph, names) for side in sides)
    sums = {probe.value: SignalSums(probe.channel_axis) for probe in probes}
    dtypes = {port.name: port.dtype for port in sides[1].manifest.graph(graph).inputs}
    progress.start(f"comparing layers of {graph}", len(answers))
    for answer in answers:
        for feed, theirs in inputs.run(graph, reference, names, answer):
            cast = {name: array.astype(dtypes[name], copy=False) for name, array in feed.items()}
            ours = dict(zip(names, found.run(names, cast), strict=True))
            _add(graph, sums, ours, theirs)
        progress.advance(1)
    progress.finish()
    return [
        LayerError(graph, probe.layer.name, probe.layer.modules, sums[probe.value].signal())
        for probe in probes
    ]


def _add(
    graph: str,
    sums: Mapping[str, SignalSums],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> None:
    for name, total in sums.items():
        try:
            total.add(ours[name], theirs[name])
        except ValueError as error:
            msg = f"{graph}, value {name}: {error}; expected graphs of the same model"
            raise ParityError(msg) from error
