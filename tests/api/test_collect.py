from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from vlmport.api.builtin_cases import builtin_cases
from vlmport.api.collect import CollectOptions, collect
from vlmport.api.progress import SilentProgress
from vlmport.calibration.layers import find_layers
from vlmport.calibration.samples import CalibrationSample
from vlmport.calibration.statistics import Probe, Statistics
from vlmport.errors import CalibrationError
from vlmport.manifest import file_entry, load_manifest, save_manifest
from vlmport.runtime import VisionLanguageModel
from vlmport.runtime.messages import messages_from_prompt

Probes = dict[str, list[Probe]]
OPTIONS = CollectOptions(new_tokens=4, threads=1, block_samples=1)


def layer_probes(bundle: Path) -> Probes:
    """Everything about the input of every layer."""
    probes: Probes = {}
    for graph in load_manifest(bundle).graphs:
        layers = find_layers(ir.load(bundle / graph.file))
        probes[graph.name] = [
            Probe(layer.activation.name or "", 1 if layer.operator == "Conv" else -1, True, True)
            for layer in layers
        ]
        probes[graph.name] = [
            replace(probe, second_moment=probe.channel_axis == -1) for probe in probes[graph.name]
        ]
    return {name: of_graph for name, of_graph in probes.items() if of_graph}


def questions() -> list[CalibrationSample]:
    """About one or two pictures of awkward sizes and modes, and one without."""
    return [CalibrationSample(case.name, case.images, case.prompt) for case in builtin_cases()][:4]


def assert_equal(first: Statistics, second: Statistics) -> None:
    """To the last bit."""
    assert first.keys() == second.keys()
    for graph, of_graph in first.items():
        assert of_graph.keys() == second[graph].keys()
        for name, one in of_graph.items():
            other = second[graph][name]
            for number in ("positions", "minimum", "maximum", "smallest_magnitude"):
                assert getattr(one, number) == getattr(other, number), (graph, name, number)
            for array in ("channel_amax", "second_moment"):
                np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
            assert (one.histogram is None) == (other.histogram is None)
            if one.histogram is not None and other.histogram is not None:
                assert one.histogram.bin_width == other.histogram.bin_width
                np.testing.assert_array_equal(one.histogram.counts, other.histogram.counts)


@pytest.fixture(scope="module")
def probes(trained_bundle: Path) -> Probes:
    return layer_probes(trained_bundle)


@pytest.fixture(scope="module")
def whole(trained_bundle: Path, probes: Probes) -> Statistics:
    return collect(trained_bundle, probes, questions(), OPTIONS, SilentProgress())


def decoder_values(
    bundle: Path, embeds: NDArray[np.float32], names: Iterable[str]
) -> dict[str, NDArray[np.float32]]:
    """A sequence in one run from an empty cache, in a session of its own."""
    model = ir.load(bundle / "decoder.onnx")
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = list(names)
    model.graph.outputs.extend(values[name] for name in names)
    copy = bundle.parent / "copy"
    shutil.copytree(bundle, copy, dirs_exist_ok=True)
    ir.save(model, copy / "probed.onnx")
    session: Any = onnxruntime.InferenceSession(copy / "probed.onnx")
    length = len(embeds)
    lengths = {"batch": 1, "sequence_length": length, "capacity": length}
    fed = {
        port.name: np.zeros(
            [d if isinstance(d, int) else lengths[d] for d in port.shape], port.dtype
        )
        for port in load_manifest(bundle).graph("decoder").inputs
    }
    fed["inputs_embeds"][0] = embeds
    fed["position_ids"][0] = np.arange(length)
    fed["valid_lengths"][0] = length
    return dict(zip(names, session.run(names, fed), strict=True))


def test_the_decoder_is_seen_with_the_prompt_and_every_decode_step(
    trained_bundle: Path, probes: Probes
) -> None:
    """As one run over question and answer together sees it."""
    sample = CalibrationSample("one", (builtin_cases()[1].images[0],), "What is this?")
    model = VisionLanguageModel.load(trained_bundle)
    answer = model.generate(prompt=sample.prompt, images=sample.images, max_new_tokens=4)
    image = model.prepare(sample.images[0])
    placeholder = model.manifest.prompt.image_placeholder
    prompt = model.encode(messages_from_prompt(sample.prompt, 1, placeholder), [image.layout])
    ids = np.concatenate([prompt.input_ids, answer.token_ids[:-1]])  # the last is never fed
    mask = np.concatenate([prompt.image_mask, np.zeros(len(answer.token_ids) - 1, np.bool_)])
    embeds = model.inputs_embeds(np.where(mask, 0, ids)[None])[0]
    embeds[mask] = model.image_features(image)
    assert len(answer.token_ids) > 1

    names = [probe.value for probe in probes["decoder"] if probe.value != "squeeze"]
    expected = decoder_values(trained_bundle, embeds, names)
    found = collect(trained_bundle, probes, [sample], OPTIONS, SilentProgress())["decoder"]
    for name in names:
        rows = expected[name].reshape(-1, expected[name].shape[-1]).astype(np.float64)
        one, size = found[name], np.abs(rows).max()
        assert one.positions == len(rows) == len(ids)
        np.testing.assert_allclose(one.minimum, rows.min(), atol=1e-4 * size)
        assert one.channel_amax is not None
        np.testing.assert_allclose(one.channel_amax, np.abs(rows).max(axis=0), atol=1e-4 * size)
        assert one.second_moment is not None
        product = rows.T @ rows
        np.testing.assert_allclose(one.second_moment, product, atol=1e-4 * np.abs(product).max())
        assert one.histogram is not None
        assert one.histogram.counts.sum() == rows.size
    # The head reads one row after the prompt and one a decode step.
    assert found["squeeze"].positions == len(answer.token_ids)


def test_image_graphs_see_pixels_and_features(whole: Statistics, trained_bundle: Path) -> None:
    model = VisionLanguageModel.load(trained_bundle)
    prepared = [model.prepare(image) for sample in questions() for image in sample.images]
    pixels = np.concatenate([image.inputs["pixel_values"] for image in prepared])
    of_pixels = whole["vision_encoder"]["pixel_values"]
    assert of_pixels.positions == pixels[:, 0].size
    np.testing.assert_array_equal(of_pixels.channel_amax, np.abs(pixels).max(axis=(0, 2, 3)))
    features = model.run("vision_encoder", {"pixel_values": pixels})["vision_features"]
    of_features = whole["projector"]["vision_features"]
    assert of_features.positions == features[..., 0].size
    np.testing.assert_allclose(of_features.maximum, features.max(), rtol=1e-4)


def test_pieces_of_a_prompt_give_the_same_statistics(
    trained_bundle: Path, probes: Probes, whole: Statistics
) -> None:
    options = replace(OPTIONS, max_probe_bytes=100_000)  # a few tokens
    found = collect(trained_bundle, probes, questions(), options, SilentProgress())
    for name, one in found["decoder"].items():
        other = whole["decoder"][name]
        assert one.positions == other.positions
        np.testing.assert_allclose(one.amax, other.amax, rtol=1e-4)


class StopsAfter(SilentProgress):
    def __init__(self, samples: int) -> None:
        self._left = samples

    def advance(self, count: int, /) -> None:
        self._left -= count
        if self._left <= 0:
            raise KeyboardInterrupt


class Counts(SilentProgress):
    def __init__(self) -> None:
        self.advances: list[int] = []

    def advance(self, count: int, /) -> None:
        self.advances.append(count)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_bits(
    trained_bundle: Path, probes: Probes, whole: Statistics, tmp_path: Path, stop_after: int
) -> None:
    options = replace(OPTIONS, state_file=tmp_path / "state.safetensors", state_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        collect(trained_bundle, probes, questions(), options, StopsAfter(stop_after))
    progress = Counts()
    assert_equal(collect(trained_bundle, probes, questions(), options, progress), whole)
    assert progress.advances == [stop_after, *[1] * (len(questions()) - stop_after)]
    again = Counts()
    assert_equal(collect(trained_bundle, probes, questions(), options, again), whole)
    assert again.advances == []


def test_a_run_that_was_stopped_within_a_block_goes_on_behind_the_block_before(
    trained_bundle: Path, probes: Probes, tmp_path: Path
) -> None:
    of_two = replace(OPTIONS, block_samples=2)
    unbroken = collect(trained_bundle, probes, questions(), of_two, SilentProgress())
    options = replace(of_two, state_file=tmp_path / "state.safetensors", state_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        collect(trained_bundle, probes, questions(), options, StopsAfter(3))
    progress = Counts()
    assert_equal(collect(trained_bundle, probes, questions(), options, progress), unbroken)
    assert progress.advances == [2, 1, 1]


def test_a_state_file_is_not_written_at_every_sample(
    trained_bundle: Path, probes: Probes, tmp_path: Path
) -> None:
    options = replace(OPTIONS, state_file=tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        collect(trained_bundle, probes, questions(), options, StopsAfter(2))
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_run_are_refused_with_what_differs(
    trained_bundle: Path, probes: Probes, tmp_path: Path
) -> None:
    options = replace(OPTIONS, state_file=tmp_path / "state.safetensors")
    asked = questions()[:2]
    collect(trained_bundle, probes, asked, options, SilentProgress())
    changes: list[tuple[Probes, list[CalibrationSample], CollectOptions, str]] = [
        ({"decoder": probes["decoder"]}, asked, options, "other probes;"),
        (probes, asked[::-1], options, "other samples;"),
        (probes, asked, replace(options, new_tokens=5), "other options;"),
        ({"decoder": probes["decoder"]}, asked[:1], options, "other probes, other samples;"),
    ]
    for of_probes, samples, changed, words in changes:
        with pytest.raises(CalibrationError, match=words):
            collect(trained_bundle, of_probes, samples, changed, SilentProgress())


@pytest.mark.parametrize("keeps_file", [False, True])
def test_groups_of_probes_give_the_same_bits(
    trained_bundle: Path, probes: Probes, whole: Statistics, tmp_path: Path, keeps_file: bool
) -> None:
    """The data runs once a group where second moments do not fit together."""
    state_file = tmp_path / "state.safetensors" if keeps_file else None
    options = replace(OPTIONS, max_second_moment_bytes=1_500_000, state_file=state_file)
    progress = Counts()
    found = collect(trained_bundle, probes, questions(), options, progress)
    groups = sum(progress.advances) // len(questions())
    assert groups >= 3
    assert_equal(found, whole)
    files = ["state.safetensors", *(f"state.safetensors.{n}" for n in range(2, groups + 1))]
    assert sorted(path.name for path in tmp_path.iterdir()) == (files if keeps_file else [])
    if keeps_file:
        again = Counts()
        assert_equal(collect(trained_bundle, probes, questions(), options, again), whole)
        assert sum(again.advances) == 0


@pytest.fixture
def broken_bundle(trained_bundle: Path, tmp_path: Path) -> Callable[[str, float], Path]:
    """A bundle in which one weight of the decoder has one wrong element."""

    def make(weight: str, wrong: float) -> Path:
        bundle = tmp_path / "broken"
        shutil.copytree(trained_bundle, bundle)
        tensor = ir.load(bundle / "decoder.onnx").graph.initializers[weight].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        path = bundle / tensor.location
        with path.open("r+b") as stream:
            stream.seek(tensor.offset or 0)
            stream.write(np.array([wrong], np.float32).tobytes())
        manifest = load_manifest(bundle)
        changed = file_entry(bundle, path)
        files = tuple(changed if old.path == changed.path else old for old in manifest.files)
        save_manifest(bundle, replace(manifest, files=files))
        return bundle

    return make


@pytest.mark.parametrize(("wrong", "kind"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_what_is_not_finite_is_named_by_module_and_sample(
    broken_bundle: Callable[[str, float], Path], probes: Probes, wrong: float, kind: str
) -> None:
    layer = "language_model.model.layers.1.mlp"
    bundle = broken_bundle(f"{layer}.gate_proj.weight.T+up_proj.weight.T", wrong)
    with pytest.raises(CalibrationError) as caught:
        collect(bundle, probes, questions(), OPTIONS, SilentProgress())
    message = str(caught.value)
    assert message.startswith(f"text only, short: decoder, input of {layer}.down_proj (value ")
    # An infinite weight gives infinity, or NaN where it meets another.
    assert "found NaN in its activations" in message or f"found {kind} in" in message


def test_probes_that_cannot_be_followed_are_refused(trained_bundle: Path) -> None:
    bad = {
        "decodr": ("x", "the bundle has no such graph; did you mean decoder"),
        "decoder": ("nothing_39", "a value that the graph does not compute"),
        "embed_tokens": ("input_ids", "expected a float value"),
    }
    for graph, (value, words) in bad.items():
        with pytest.raises(CalibrationError, match=words):
            collect(trained_bundle, {graph: [Probe(value)]}, questions(), OPTIONS, SilentProgress())
    cache = {"decoder": [Probe("present_key_values.0.key")]}
    with pytest.raises(CalibrationError, match="a cache with rows that nothing was written to"):
        collect(trained_bundle, cache, questions(), OPTIONS, SilentProgress())


def test_samples_that_cannot_be_asked_are_all_listed(
    trained_bundle: Path, probes: Probes, tmp_path: Path
) -> None:
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    samples = [
        *questions()[:1],
        CalibrationSample("first.png", (tmp_path / "missing.png",), "What?"),
        CalibrationSample("second.png", (tmp_path / "damaged.png",), "What?"),
        CalibrationSample("third", (Image.new("RGB", (8, 8)),), "<image> and <image>"),
        CalibrationSample("fourth", (), "word " * 5000),
    ]
    with pytest.raises(CalibrationError) as caught:
        collect(trained_bundle, probes, samples, OPTIONS, SilentProgress())
    lines = str(caught.value).splitlines()
    assert lines[0] == "calibration data: 4 faults found:"
    for line, words in zip(
        lines[1:],
        (
            "first.png: .*no such file",
            "second.png: .*not a picture",
            "third: .*2 places",
            "fourth: ",
        ),
        strict=True,
    ):
        assert re.search(words, line)


def test_data_that_never_reaches_a_graph_is_refused(trained_bundle: Path, probes: Probes) -> None:
    text_only = [CalibrationSample("text", (), "Hello!")]
    with pytest.raises(CalibrationError, match="none of 1 samples has a picture"):
        collect(trained_bundle, probes, text_only, OPTIONS, SilentProgress())
    decoder = {"decoder": probes["decoder"]}
    assert collect(trained_bundle, decoder, text_only, OPTIONS, SilentProgress())["decoder"]
    with pytest.raises(CalibrationError, match="found no sample"):
        collect(trained_bundle, decoder, [], OPTIONS, SilentProgress())
