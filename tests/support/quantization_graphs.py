"""The float graphs of the trained checkpoints, inputs for them, and their outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import onnxruntime
from support.trained import exported

from vlmport.calibration.statistics import Histogram, ValueStatistics
from vlmport.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "FAMILIES",
    "decoder_calls",
    "graph_ids",
    "image_inputs",
    "measure",
    "open_session",
    "run_decoder",
    "statistics_of",
    "whole_proto",
]

FAMILIES = ("fuyu", "idefics2", "paligemma", "tinyllava")
CAPACITY = 24


def graph_ids(kind: str) -> tuple[str, ...]:
    """The families that have a graph of that name."""
    return tuple(name for name in FAMILIES if (kind, name) != ("vision_encoder", "fuyu"))


def whole_proto(model: ir.Model) -> onnx.ModelProto:
    """The model with its weights in it, for those who read it from memory."""
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = model.graph.initializers[tensor.name].const_value
            assert value is not None
            tensor.CopyFrom(onnx.numpy_helper.from_array(value.numpy(), tensor.name))
    return proto


def open_session(model: ir.Model, options: Any = None) -> onnxruntime.InferenceSession:
    """A session of one thread."""
    options = options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        whole_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def image_inputs(family: str, kind: str, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random inputs of a vision encoder or projector, of the kinds that the manifest lists."""
    spec = next(graph for graph in load_manifest(exported(family)).graphs if graph.name == kind)
    rng = np.random.default_rng(seed)
    symbols = {"num_images": 2, "num_tiles": 2, "num_patches": 9}
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        # Pictures of three by three patches, where the size is free.
        shape = tuple(
            length if isinstance(length, int) else symbols.get(length, 48)
            for length in tensor.shape
        )
        if tensor.dtype == "bool":
            inputs[tensor.name] = np.ones(shape, bool)
        elif tensor.dtype == "int64":
            inputs[tensor.name] = np.full(shape, 3)
        else:
            inputs[tensor.name] = rng.uniform(-1, 1, shape).astype(np.float32)
    return inputs


def decoder_calls(model: ir.Model, seed: int = 0) -> Iterator[dict[str, NDArray[Any]]]:
    """A prompt of two rows of different lengths, then single tokens, without the cache."""
    hidden = int(model.graph.inputs[0].shape[2])  # type: ignore[index,arg-type]
    rng = np.random.default_rng(seed)
    lengths = np.array([7, 5])
    begins = np.zeros(2, np.int64)
    for width in (7, 1, 1, 1, 1):
        ends = begins + (lengths if width > 1 else 1)
        yield {
            "inputs_embeds": rng.normal(size=(2, width, hidden)).astype(np.float32),
            "position_ids": begins[:, None] + np.arange(width),
            "write_indices": begins,
            "valid_lengths": ends,
        }
        begins = ends


def measure(
    model: ir.Model, values: Sequence[ir.Value], calls: Sequence[Mapping[str, NDArray[Any]]]
) -> dict[str, ValueStatistics]:
    """Statistics of values over calls, the cache handed from call to call; all of them at once."""
    values = list(dict.fromkeys(values))
    inner = [value for value in values if not value.is_graph_input()]
    known = len(model.graph.outputs)
    kept = [value.type for value in inner]
    for value in inner:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.extend(inner)
    session = open_session(model)
    while len(model.graph.outputs) > known:
        model.graph.outputs.pop()
    for value, found in zip(inner, kept, strict=True):
        value.type = found
    seen: dict[str, list[NDArray[np.float32]]] = {str(value.name): [] for value in values}
    for call, outputs in _chained(session, calls):
        for name, arrays in seen.items():
            array = call[name] if name in call else outputs[name]
            # Channels last, but for pictures.
            arrays.append(np.moveaxis(array, 1, -1) if array.ndim == 4 else array)
    return {name: statistics_of(arrays) for name, arrays in seen.items()}


def statistics_of(arrays: Sequence[NDArray[np.float32]]) -> ValueStatistics:
    """All statistics but second moments of arrays [.., channels]."""
    rows = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])
    magnitudes = np.abs(rows)
    width = float(magnitudes.max()) / 2048 or 1.0
    counts, _ = np.histogram(magnitudes, 2048, (0, width * 2048))
    return ValueStatistics(
        positions=len(rows),
        minimum=float(rows.min()),
        maximum=float(rows.max()),
        smallest_magnitude=float(magnitudes[magnitudes > 0].min(initial=np.inf)),
        channel_amax=magnitudes.max(0),
        histogram=Histogram(counts, width),
        second_moment=rows.T @ rows,
    )


def _chained(
    session: onnxruntime.InferenceSession, calls: Sequence[Mapping[str, NDArray[Any]]]
) -> Iterator[tuple[Mapping[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
    """Each call with all outputs; the cache, if the graph has one, is handed on."""
    names = [value.name for value in session.get_outputs()]
    cache = {
        value.name: np.zeros((2, value.shape[1], CAPACITY, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    for call in calls:
        results = session.run(None, {**call, **cache})
        outputs = dict(zip(names, map(np.asarray, results), strict=True))
        cache = {name: outputs[name.replace("past", "present", 1)] for name in cache}
        yield call, outputs


def run_decoder(
    model: ir.Model,
    calls: Sequence[Mapping[str, NDArray[Any]]],
    session: onnxruntime.InferenceSession | None = None,
) -> tuple[list[NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """The logits of each call, the cache handed from call to call, and the cache at the end."""
    logits: list[NDArray[np.float32]] = []
    outputs: dict[str, NDArray[Any]] = {}
    for _, outputs in _chained(session or open_session(model), calls):
        logits.append(outputs["logits"])
    cache = {
        name.replace("present", "past", 1): array
        for name, array in outputs.items()
        if name.startswith("present")
    }
    return logits, cache
