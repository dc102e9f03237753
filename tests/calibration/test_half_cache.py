from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from support.engine_builds import built, parsed_layers
from support.graph_runs import observe, random_inputs, save

from vlmport.calibration.half_cache import half_cache_
from vlmport.calibration.half_precision import half_probes
from vlmport.errors import CalibrationError, GraphError

STEPS = 6
BATCH, PROMPT, CAPACITY = 2, 7, 16


@pytest.fixture(scope="module")
def decoder(trained_bundle: Path) -> Path:
    return trained_bundle / "decoder.onnx"


class InPlace:
    """A decoder whose cache stays in one set of buffers."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.arrays: dict[str, NDArray[Any]] = {}
        for port in self.session.get_inputs():
            if port.name.startswith("past"):
                dtype = np.float16 if port.type == "tensor(float16)" else np.float32
                shape = (BATCH, port.shape[1], CAPACITY, port.shape[3])
                self.arrays[port.name] = np.zeros(shape, dtype)

        make = onnxruntime.OrtValue.ortvalue_from_numpy  # shares the array's memory
        self.buffers = {name: make(array) for name, array in self.arrays.items()}

    def step(self, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past", "present"), buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy())


def decode(path: Path) -> tuple[list[NDArray[np.float32]], dict[str, NDArray[Any]]]:
    """Logits of a prompt and of each step after it, and the cache in the end."""
    model, generator = InPlace(path), np.random.default_rng(0)
    logits, written, valid = [], np.zeros(BATCH, np.int64), np.array([PROMPT, PROMPT - 2])
    for step in range(STEPS + 1):
        length = PROMPT if step == 0 else 1
        position = written[:, None] + np.arange(length)
        inputs = {
            "inputs_embeds": generator.normal(size=(BATCH, length, 128)).astype(np.float32),
            "position_ids": position,
            "write_indices": written,
            "valid_lengths": valid,
        }
        logits.append(model.step(inputs))
        written, valid = valid, valid + 1
    return logits, model.arrays


def test_decodes_in_place_as_in_float32(
    trained_bundle: Path, decoder: Path, tmp_path: Path
) -> None:
    model = ir.load(decoder)
    before = sum(node.op_type == "Cast" for node in model.graph)
    layers = sum(node.op_type == "Attention" for node in model.graph)
    assert half_cache_(model) == 2 * layers
    # Queries, keys and values down and the result up; never the cache.
    assert sum(node.op_type == "Cast" for node in model.graph) == before + 4 * layers
    path = save(model, tmp_path / "decoder.onnx")
    expected, kept = decode(decoder)
    found, stored = decode(path)
    for name, array in kept.items():
        assert stored[name].dtype == np.float16
        assert np.abs(array).max() > 0.1
        np.testing.assert_allclose(stored[name], array, rtol=4e-3, atol=4e-3)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    # An engine updates it in place too.
    assert parsed_layers(path)["KV_CACHE_UPDATE"] == 2 * layers
    engine = built(path, trained_bundle)
    assert sum(bool(port.aliases) for port in engine.outputs) == 2 * layers


def test_weights_and_other_ports_stay_float32(decoder: Path) -> None:
    model = ir.load(decoder)
    before = {v.name: v.dtype for v in model.graph.initializers.values()}
    half_cache_(model)
    assert {v.name: v.dtype for v in model.graph.initializers.values()} == before
    halves = {v.name for v in model.graph.inputs if v.dtype == ir.DataType.FLOAT16}
    assert halves == {v.name for v in model.graph.inputs if str(v.name).startswith("past")}


def test_keys_beyond_float16_are_refused(decoder: Path, tmp_path: Path) -> None:
    model = ir.load(decoder)
    seen = observe(decoder, half_probes(model), random_inputs(model), tmp_path)
    key = next(node.inputs[1] for node in model.graph if node.op_type == "TensorScatter")
    assert key is not None
    value = seen[str(key.name)]
    half_cache_(ir.load(decoder), seen)
    seen[str(key.name)] = type(value)(value.positions, -1e5, 1e5, 1.0, value.channel_amax)
    with pytest.raises(CalibrationError, match=r"self_attn.*: overflow, .* leave the cache"):
        half_cache_(model, seen)


def test_a_graph_without_a_float32_cache_is_refused(decoder: Path, trained_bundle: Path) -> None:
    with pytest.raises(GraphError, match="no TensorScatter updates a float32 input"):
        half_cache_(ir.load(trained_bundle / "projector.onnx"))
    model = ir.load(decoder)
    half_cache_(model)
    with pytest.raises(GraphError, match="not in half precision yet"):
        half_cache_(model)
