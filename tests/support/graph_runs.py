"""Runs whole graphs of a bundle in ONNX Runtime, and watches their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime

from vlmport.calibration.half_precision import float32_ports, half_precision_
from vlmport.calibration.statistics import ValueStatistics
from vlmport.graphs.passes.emulate_bfloat16 import EmulateBfloat16Pass
from vlmport.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.calibration.statistics import Probe

    Arrays = Mapping[str, NDArray[Any]]

__all__ = ["half_bundle", "observe", "random_inputs", "run_saved", "run_whole", "save"]

_LENGTHS = {
    "batch": 2,
    "capacity": 16,
    "height": 64,
    "num_images": 2,
    "num_patches": 16,
    "num_tiles": 2,
    "sequence_length": 7,
    "width": 64,
}
_INTEGERS = {
    "patch_counts": np.array([[4, 4], [3, 2]]),
    "valid_lengths": np.array([7, 5]),
    "write_indices": np.zeros(2, np.int64),
}


def random_inputs(model: ir.Model, first_position: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of any graph of a bundle; floats that every half-precision type holds exactly.

    Floats are float32; `run_saved` casts them to what the graph takes.
    """
    generator = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        name = str(value.name)
        shape = [_LENGTHS[str(axis)] if not isinstance(axis, int) else axis for axis in value.shape]
        if name in _INTEGERS:
            inputs[name] = _INTEGERS[name]
        elif name == "position_ids":
            inputs[name] = np.tile(np.arange(first_position, first_position + shape[1]), (2, 1))
        elif name == "input_ids":
            inputs[name] = generator.integers(0, 500, shape)
        elif value.dtype == ir.DataType.BOOL:
            inputs[name] = generator.random(shape) < 0.8
        elif name.startswith("past"):
            inputs[name] = np.zeros(shape, np.float32)
        else:
            drawn = generator.normal(size=shape).astype(ml_dtypes.bfloat16)
            inputs[name] = drawn.astype(np.float32)
    return inputs


def save(model: ir.Model, path: Path) -> Path:
    """Writes a model, its larger weights beside it."""
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def run_saved(path: Path, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Output name -> array. A bfloat16 graph runs emulated: its outputs are float32."""
    model = ir.load(path)
    if EmulateBfloat16Pass()(model).modified:
        path = save(model, path.with_name(f"emulated_{path.name}"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a cache that is not bound in place is copied, with a warning
    session = onnxruntime.InferenceSession(path, options)
    half = {port.name for port in session.get_inputs() if port.type == "tensor(float16)"}
    fed = {name: a.astype(np.float16) if name in half else a for name, a in inputs.items()}
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(None, fed)), strict=True))


def run_whole(model: ir.Model, inputs: Arrays, folder: Path) -> dict[str, NDArray[Any]]:
    """The same of a model in memory."""
    return run_saved(save(model, folder / "whole.onnx"), inputs)


def half_bundle(bundle: Path, kind: Literal["fp16", "bf16"], folder: Path) -> Path:
    """Writes the graphs of a float32 bundle to a folder, each in half precision."""
    ports = float32_ports(load_manifest(bundle).graphs)
    for path in sorted(bundle.glob("*.onnx")):
        model = ir.load(path)
        half_precision_(model, kind, None, ports)
        save(model, folder / path.name)
    return folder


def observe(
    path: Path, probes: Sequence[Probe], inputs: Arrays, folder: Path
) -> dict[str, ValueStatistics]:
    """Statistics of values of a float32 graph over one run."""
    model = ir.load(path)
    known = {value.name: value for node in model.graph for value in node.outputs}
    ports = {value.name for value in model.graph.outputs}
    for probe in probes:
        if probe.value not in ports and probe.value in known:
            known[probe.value].type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(known[probe.value])
    found = {**inputs, **run_whole(model, inputs, folder)}
    return {probe.value: _statistics(found[probe.value]) for probe in probes}


def _statistics(array: NDArray[Any]) -> ValueStatistics:
    magnitudes = np.abs(array[array != 0])
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    return ValueStatistics(
        positions=len(rows),
        minimum=float(array.min()),
        maximum=float(array.max()),
        smallest_magnitude=float(magnitudes.min(initial=np.inf)),
        channel_amax=np.abs(rows).max(axis=0).astype(np.float32),
    )
