"""Runs the graphs that have no cache on the GPU: pictures and tokens become embeddings there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.device.memory import DeviceBuffer
from vlmport.runtime.device.sizes import itemsize, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.contract_engines import EnginePort
    from vlmport.runtime.backends.base import ImageFeatures
    from vlmport.runtime.engines.running import EngineContext, RunningEngines

__all__ = ["DeviceRows", "GraphRunner"]


class DeviceRows:
    """Embeddings [rows, hidden_size] on the GPU; freed with the object.

    Args:
        running: the engines that made it.
        rows: how many there are.
        hidden_size: length of one.
        dtype: numpy's name of the element type, or "bfloat16".
        purpose: what it is for, in the message if there is not so much memory.
    """

    def __init__(
        self, running: RunningEngines, rows: int, hidden_size: int, dtype: str, purpose: str
    ) -> None:
        self._running = running
        self._rows = rows
        self._hidden_size = hidden_size
        self._dtype = dtype
        self.row_bytes = hidden_size * itemsize(dtype)
        self._buffer = DeviceBuffer(running.cuda, rows * self.row_bytes, purpose)

    def __len__(self) -> int:
        """Rows: image tokens, or tokens of a prompt."""
        return self._rows

    def address(self, row: int = 0) -> int:
        """Where a row lies."""
        return self._buffer.address + row * self.row_bytes

    def numpy(self) -> NDArray[np.floating[Any]]:
        """A copy on the host; float32 for bfloat16, which numpy has not."""
        with self._running.lock:
            shape = (self._rows, self._hidden_size)
            return self._running.transfer.download(self.address(), self._dtype, shape)


class GraphRunner:
    """Every graph of a bundle but the decoder.

    Args:
        running: the engines.
        manifest: the bundle's.
    """

    def __init__(self, running: RunningEngines, manifest: Manifest) -> None:
        self._running = running
        self._image_graphs = manifest.image_graphs
        self._hidden_size = manifest.dimensions.hidden_size
        self._dtype = manifest.graph("decoder").inputs[0].dtype
        self._contexts: dict[str, EngineContext] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph on arrays of the host; see `Backend.run`."""
        with self._running.lock:
            context = self._context(graph)
            tensors = self._queue(context, self._uploaded(context, inputs))
            results = {}
            for port in context.engine.outputs:
                found = tensors[port.name]
                results[port.name] = self._running.transfer.download(
                    found.address, port.dtype, found.shape
                )
            return results

    def image_features(self, tiles: Sequence[Mapping[str, NDArray[Any]]]) -> DeviceRows:
        """Runs the image graphs; see `Backend.image_features`."""
        with self._running.lock:
            features: DeviceRows | None = None
            for index, tile in enumerate(tiles):
                found = self._features_of(tile)
                rows = math.prod(found.shape) // self._hidden_size
                if features is None:  # tiles of one picture have equally many
                    features = self._rows(rows * len(tiles), "the features of a picture")
                size = rows * features.row_bytes
                self._running.stream.copy(features.address(index * rows), found.address, size)
            assert features is not None
            return features

    def adopt_features(self, features: NDArray[np.floating[Any]]) -> DeviceRows:
        """Copies features to the GPU; see `Backend.adopt_features`."""
        with self._running.lock:
            rows = self._rows(len(features), "the features of a picture")
            self._running.transfer.upload(features, self._dtype, rows.address())
            return rows

    def embed_prompt(
        self,
        text_ids: NDArray[np.int64],
        image_mask: NDArray[np.bool_],
        features: Sequence[ImageFeatures],
    ) -> DeviceRows:
        """Embeds a prompt, in pieces that the engine takes; see `Backend.embed_prompt`."""
        with self._running.lock:
            stream = self._running.stream
            prompt = self._rows(len(text_ids), "the embeddings of a prompt")
            context = self._context("embed_tokens")
            piece = context.largest("input_ids", 1)
            for start in range(0, len(text_ids), piece):
                ids = {"input_ids": text_ids[None, start : start + piece]}
                found = self._queue(context, self._uploaded(context, ids))["inputs_embeds"]
                stream.copy(prompt.address(start), found.address, found.shape[1] * prompt.row_bytes)
            for row, source, rows in _placements(image_mask, features):
                stream.copy(prompt.address(row), source, rows * prompt.row_bytes)
            return prompt

    def _features_of(self, tile: Mapping[str, NDArray[Any]]) -> _Tensor:
        tensors: dict[str, _Tensor] = {}
        for graph in self._image_graphs:
            context = self._context(graph)
            tensors |= self._uploaded(context, tile)
            tensors |= self._queue(context, tensors)
        return tensors["image_features"]

    def _context(self, graph: str) -> EngineContext:
        if graph not in self._contexts:
            self._contexts[graph] = self._running.context(graph, "default")
        return self._contexts[graph]

    def _rows(self, rows: int, purpose: str) -> DeviceRows:
        return DeviceRows(self._running, rows, self._hidden_size, self._dtype, purpose)

    def _uploaded(
        self, context: EngineContext, arrays: Mapping[str, NDArray[Any]]
    ) -> dict[str, _Tensor]:
        """Those of the arrays that a graph takes, on the GPU until the next graph's are."""
        tensors = {}
        for port in context.engine.inputs:
            if port.name in arrays:
                array = arrays[port.name]
                tensors[port.name] = self._tensor(port, array.shape)
                self._running.transfer.upload(array, port.dtype, tensors[port.name].address)
        return tensors

    def _queue(self, context: EngineContext, inputs: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
        """Queues a run; the outputs are overwritten by the graph's next one."""
        context.set_shapes({name: tensor.shape for name, tensor in inputs.items()})
        outputs = {
            port.name: self._tensor(port, context.output_shape(port.name))
            for port in context.engine.outputs
        }
        context.bind({name: tensor.address for name, tensor in {**inputs, **outputs}.items()})
        context.enqueue()
        return outputs

    def _tensor(self, port: EnginePort, shape: tuple[int, ...]) -> _Tensor:
        size = size_of(port.dtype, shape)
        return _Tensor(self._running.workspace.address(port.name, size), shape)


@dataclass(frozen=True, slots=True)
class _Tensor:
    address: int
    shape: tuple[int, ...]


def _placements(
    image_mask: NDArray[np.bool_], features: Sequence[ImageFeatures]
) -> Iterator[tuple[int, int, int]]:
    """Copies that put features in place: (row of the prompt, address of the features, rows)."""
    places = np.flatnonzero(image_mask)
    used = 0
    for image in features:
        assert isinstance(image, DeviceRows)  # from this backend
        mine = places[used : used + len(image)]
        used += len(mine)
        # A run of neighbouring places is one copy.
        breaks = np.flatnonzero(np.diff(mine) != 1) + 1
        taken = 0
        for run in np.split(mine, breaks):
            if len(run):
                yield int(run[0]), image.address(taken), len(run)
                taken += len(run)
