"""Image graphs that something else computes: neither opened nor expected."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.emulated_engines import build_emulated, default_options, open_emulated
from support.served_models import questions, served_model
from support.trained import exported

from vlmport.errors import BundleError, EngineError, VlmportError
from vlmport.manifest import load_manifest
from vlmport.runtime import VisionLanguageModel

FAMILIES = ("fuyu", "idefics2", "paligemma", "tinyllava")


def without_image_graphs(bundle: Path, target: Path) -> Path:
    shutil.copytree(bundle, target)
    for graph in load_manifest(target).image_graphs:
        for path in target.glob(f"{graph}.onnx*"):
            path.unlink()
    return target


class Elsewhere:
    """The image graphs of another model.

    Attributes:
        asked: tiles of each picture so far.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self.asked: list[int] = []

    def __call__(self, tiles: Sequence[Mapping[str, Any]]) -> Any:
        self.asked.append(len(tiles))
        features = []
        for tile in tiles:
            arrays = dict(tile)
            for graph in self._model.manifest.image_graphs:
                arrays |= self._model.run(graph, arrays)
            features.append(arrays["image_features"])
        return np.concatenate(features).reshape(-1, self._model.manifest.dimensions.hidden_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_whole_bundle(family: str, tmp_path: Path) -> None:
    whole = served_model(family)
    compute = Elsewhere(whole)
    bundle = without_image_graphs(exported(family), tmp_path / "bundle")
    model = VisionLanguageModel.load(bundle, threads=1, image_features=compute)
    requests = questions(family, 8)
    found = [result.token_ids for result in model.generate_batch(requests)]
    assert found == [result.token_ids for result in whole.generate_batch(requests)]
    assert len(compute.asked) == sum(len(request.images) for request in requests)


def test_image_graphs_are_expected_otherwise(trained_bundle: Path, tmp_path: Path) -> None:
    bundle = without_image_graphs(trained_bundle, tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx: no such file"):
        VisionLanguageModel.load(bundle)
    # The others are, in any case.
    next(bundle.glob("decoder.onnx*")).unlink()
    with pytest.raises(BundleError, match=r"decoder\.onnx.*: no such file"):
        VisionLanguageModel.load(bundle, image_features=lambda _: np.zeros((1, 1)))


def test_features_of_another_shape_are_refused(trained_bundle: Path) -> None:
    model = VisionLanguageModel.load(
        trained_bundle, verify=False, threads=1, image_features=lambda _: np.zeros((3, 4))
    )
    message = r"^image features: found \[3, 4\] from .*; expected \[\d+, \d+\] for this picture"
    with pytest.raises(VlmportError, match=message):
        model.generate_batch(questions("tinyllava", 1))


def test_engines_of_image_graphs_may_be_missing(trained_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    built = build_emulated(trained_bundle, folder, default_options(load_manifest(trained_bundle)))
    whole = served_model("tinyllava")
    for graph in whole.manifest.image_graphs:
        (folder / built.engine(graph).file).unlink()
    with pytest.raises(EngineError, match="missing"):
        open_emulated(trained_bundle, folder)
    compute = Elsewhere(whole)
    found = open_emulated(trained_bundle, folder, compute_features=compute)
    request = questions("tinyllava", 1)[0]
    answer = found.model.generate_batch([request])[0]
    assert answer.token_ids == whole.generate_batch([request])[0].token_ids
    assert compute.asked == [1]
    found.backend.close()
    (folder / built.engine("decoder").file).unlink()
    with pytest.raises(EngineError, match="decoder"):
        open_emulated(trained_bundle, folder, compute_features=compute)
