"""Every trained checkpoint's bundle: statistics of all layers, whatever its pictures become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from support.trained import exported
from tiny.recipes import EXAMPLES, RECIPES

from vlmport.api.collect import CollectOptions, collect
from vlmport.api.collect_backend import Accumulators, ProbedBackend, probed_graphs
from vlmport.api.default_samples import default_samples
from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.calibration.accumulate import ValueAccumulator
from vlmport.calibration.layers import find_layers
from vlmport.calibration.observers import threshold
from vlmport.calibration.recipe import ActivationMethod
from vlmport.calibration.statistics import Probe, Statistics
from vlmport.manifest import load_manifest
from vlmport.runtime import VisionLanguageModel

OPTIONS = CollectOptions(new_tokens=4, threads=1)


@pytest.fixture(scope="module", params=sorted(RECIPES))
def bundle(request: pytest.FixtureRequest) -> Path:
    return exported(str(request.param))


def probes_of(bundle: Path) -> dict[str, list[Probe]]:
    return {
        graph.name: [
            Probe(layer.activation.name or "", 1 if layer.operator == "Conv" else -1, True, True)
            for layer in find_layers(ir.load(bundle / graph.file))
        ]
        for graph in load_manifest(bundle).graphs
        if graph.name != "embed_tokens"
    }


def test_every_layer_of_every_graph_gets_a_range(bundle: Path) -> None:
    samples = default_samples(3)
    probes = probes_of(bundle)
    found = collect(bundle, probes, samples, OPTIONS, SilentProgress())
    for graph, of_graph in probes.items():
        for probe in of_graph:
            one = found[graph][probe.value]
            kept = threshold(ActivationMethod("mse"), one)
            assert 0 < kept <= one.amax, (graph, probe.value)
    model = VisionLanguageModel.load(bundle)
    asked = [
        model.generate(prompt=sample.prompt, images=sample.images, max_new_tokens=4)
        for sample in samples
    ]
    # The last token of an answer is never fed; the head reads one row for each that is chosen.
    steps = [len(answer.token_ids) - 1 for answer in asked]
    seen = sum(answer.prompt_tokens for answer in asked) + sum(steps)
    assert found["decoder"][probes["decoder"][0].value].positions == seen
    assert found["decoder"]["squeeze"].positions == len(asked) + sum(steps)
    image_tokens = sum(answer.image_tokens for answer in asked)
    last = list(found["projector"].values())[-1]
    assert image_tokens <= last.positions


def image_statistics(bundle: Path, inputs: dict[str, NDArray[Any]]) -> Statistics:
    """Of one run of the image graphs."""
    manifest = load_manifest(bundle)
    probes = {name: probes_of(bundle)[name] for name in manifest.image_graphs}
    graphs = probed_graphs(bundle, manifest, probes)
    accumulators: Accumulators = {
        name: {v.probe.value: ValueAccumulator(v.probe, v.words) for v in graph.values}
        for name, graph in graphs.items()
    }
    backend = ProbedBackend(bundle, manifest, graphs, accumulators, 1 << 20, threads=1)
    arrays = dict(inputs)
    for name in manifest.image_graphs:
        arrays |= backend.run(name, arrays)
    return {
        name: {value: one.statistics() for value, one in of_graph.items()}
        for name, of_graph in accumulators.items()
    }


def test_padding_of_a_picture_leaves_no_trace(bundle: Path) -> None:
    """A tile beside a larger one is padded; its statistics are those that it has alone."""
    model = VisionLanguageModel.load(bundle)
    inputs = model.prepare(default_samples(1)[0].images[0]).inputs
    if "patch_counts" not in inputs:
        assert model.manifest.image.kind != "native_size"
        return
    height = inputs["pixel_values"].shape[2]
    larger = ((0, 0), (0, 0), (0, height // inputs["patch_counts"][0, 0] * 2), (0, 0))
    padded = {**inputs, "pixel_values": np.pad(inputs["pixel_values"], larger, constant_values=9)}
    alone, beside = image_statistics(bundle, inputs), image_statistics(bundle, padded)
    for graph, of_graph in alone.items():
        for name, one in of_graph.items():
            other = beside[graph][name]
            assert other.positions == one.positions, (graph, name)
            np.testing.assert_allclose(other.minimum, one.minimum, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(other.maximum, one.maximum, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_bundles_are_collected_too(
    precision: str, trained_bundle: Path, tmp_path: Path
) -> None:
    """With the ranges of the float32 bundle, nearly; bfloat16 is emulated."""
    bundle = tmp_path / "bundle"
    checkpoint = EXAMPLES / "tinyllava"
    export(ExportOptions(checkpoint, bundle, precision=precision), SilentProgress())
    one_step = replace(OPTIONS, new_tokens=1)
    full, half = (
        collect(folder, probes_of(folder), default_samples(2), one_step, SilentProgress())
        for folder in (trained_bundle, bundle)
    )
    assert list(tmp_path.iterdir()) == [bundle], "nothing is left beside the bundle"
    for graph, of_graph in full.items():
        for one, other in zip(of_graph.values(), half[graph].values(), strict=True):
            assert other.positions == one.positions
            np.testing.assert_allclose(other.amax, one.amax, rtol=0.1)
