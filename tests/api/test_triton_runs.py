"""A repository's files compute what the bundle does, run by ONNX Runtime as Triton would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from support.trained import exported
from support.triton_configs import CHECKPOINTS, config_of, repository, type_of

from vlmport.contract import IMAGE_GRAPHS
from vlmport.runtime import VisionLanguageModel

GRAPHS = (*IMAGE_GRAPHS, "embed_tokens")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_ensemble_computes_the_features(checkpoint: str) -> None:
    """Its maps, followed with ONNX Runtime in Triton's place, on the files that Triton opens."""
    folder = repository(checkpoint, "onnxruntime")
    model = VisionLanguageModel.load(exported(checkpoint), threads=1)
    noise = np.random.default_rng(3).integers(0, 255, (90, 120, 3), np.uint8)
    prepared = model.prepare(Image.fromarray(noise))
    ensemble = config_of(folder / "features")
    first, *steps = ensemble.ensemble_scheduling.step
    tensors = {first.output_map[name]: array for name, array in prepared.inputs.items()}
    assert set(first.output_map) == set(prepared.inputs)
    for step in steps:
        session = opened(folder / step.model_name / "1" / "model.onnx")
        inputs = {port: tensors[name] for port, name in step.input_map.items()}
        outputs = list(step.output_map)
        for port, array in zip(outputs, session.run(outputs, inputs), strict=True):
            tensors[step.output_map[port]] = array
    features = tensors["image_features"].reshape(-1, model.manifest.dimensions.hidden_size)
    np.testing.assert_array_equal(features, model.image_features(prepared))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_first_requests_run(checkpoint: str) -> None:
    folder = repository(checkpoint, "onnxruntime")
    for graph in GRAPHS:
        if not (folder / graph).exists():
            continue
        config = config_of(folder / graph)
        (request,) = config.model_warmup
        assert request.batch_size == 1
        session = opened(folder / graph / "1" / "model.onnx")
        arrays = {name: filled(folder / graph, config, name) for name in request.inputs}
        counts = [array for array in arrays.values() if array.dtype == np.int64]
        assert graph == "embed_tokens" or all((array > 0).all() for array in counts)
        for array in session.run(None, arrays):
            assert np.isfinite(array).all()


def filled(model: Path, config: Any, name: str) -> np.ndarray[Any, Any]:
    """What Triton makes of a warm-up input."""
    given = config.model_warmup[0].inputs[name]
    port = next(port for port in config.input if port.name == name)
    assert given.data_type == port.data_type
    assert [-1] * len(port.dims) == [
        -1 for length, axis in zip(given.dims, port.dims, strict=True) if axis in (-1, length)
    ]
    dtypes = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}
    dtype = next(value for key, value in dtypes.items() if type_of(key) == given.data_type)
    shape = ([1] if config.max_batch_size else []) + list(given.dims)
    if given.zero_data:
        return np.zeros(shape, dtype)
    content = (model / "warmup" / given.input_data_file).read_bytes()
    return np.frombuffer(content, dtype).reshape(shape)


def opened(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("checkpoint", ["tinyllava", "fuyu"])
def test_the_main_model_answers_by_the_image_models(checkpoint: str) -> None:
    """Its bundle has no image graphs; their models are asked as Triton would ask them."""
    folder = repository(checkpoint, "onnxruntime")
    whole_model = VisionLanguageModel.load(exported(checkpoint), threads=1)
    graphs = whole_model.manifest.image_graphs
    sessions = [opened(folder / graph / "1" / "model.onnx") for graph in graphs]

    def image_features(tiles: Any) -> Any:
        results = []
        for tile in tiles:
            arrays = dict(tile)
            for session in sessions:
                names = [port.name for port in session.get_outputs()]
                inputs = {port.name: arrays[port.name] for port in session.get_inputs()}
                arrays |= dict(zip(names, session.run(names, inputs), strict=True))
            results.append(arrays["image_features"])
        return np.concatenate(results).reshape(-1, whole_model.manifest.dimensions.hidden_size)

    home = folder / "vlm" / "1"
    model = VisionLanguageModel.load(home / "bundle", threads=1, image_features=image_features)
    images = [Image.new("RGB", (64, 64), (200, 30, 30))]
    answers = [
        one.generate(prompt="What is this?", images=images, max_new_tokens=8).token_ids
        for one in (model, whole_model)
    ]
    assert answers[0] == answers[1]
