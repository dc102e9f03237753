"""Runs a bundle's TensorRT engines; embeddings, cache, logits and tokens stay on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmport.errors import EngineError
from vlmport.runtime.backends.tensorrt_decoding import BatchState, DecodeContexts, too_long
from vlmport.runtime.backends.tensorrt_graphs import DeviceRows, GraphRunner
from vlmport.runtime.backends.tensorrt_slots import TensorRTSlots
from vlmport.runtime.backends.tensorrt_tokens import DeviceLogitDecoding, DeviceTokenDecoding
from vlmport.runtime.device.cuda import load_cuda
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.opening import find_engines, load_engines
from vlmport.runtime.engines.running import RunningEngines

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.contract_engines import TensorRTName
    from vlmport.runtime.backends.base import ImageFeatures
    from vlmport.runtime.device.cuda import Cuda
    from vlmport.runtime.engines.bindings import Bindings
    from vlmport.runtime.sampling import TokenSampler

__all__ = ["TensorRTBackend"]


class TensorRTBackend:
    """The engines of a bundle on the first GPU that the process sees.

    Threads may share it; they take turns.

    Args:
        bundle: folder of the bundle.
        manifest: its manifest.
        backend: the TensorRT module.
        engines: folder of the engines; None for those in the bundle that fit best.
        verify: whether the digest of every engine is checked.
        elsewhere: graphs whose engines are not loaded.
        cuda: the GPU; None to look for one.
        bindings: the module; None to import it.

    Raises:
        EngineError: if the module, cuda-python, a driver or a GPU is missing, if no engines fit
            this TensorRT and this GPU, or if they do not load.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: TensorRTName,
        engines: Path | None = None,
        *,
        verify: bool = True,
        elsewhere: Collection[str] = (),
        cuda: Cuda | None = None,
        bindings: Bindings | None = None,
    ) -> None:
        bindings = bindings or load_bindings(backend)
        cuda = cuda or load_cuda()
        self.name: str = backend
        self._manifest = manifest
        version = bindings.__version__
        folder, found = find_engines(bundle, backend, version, cuda.device(), engines, elsewhere)
        loaded = load_engines(
            folder, found, manifest, bindings, cuda, verify=verify, elsewhere=elsewhere
        )
        self._running = RunningEngines(cuda, bindings, loaded)
        self._graphs = GraphRunner(self._running, manifest)
        self._contexts = DecodeContexts(self._running)
        self._idle: BatchState | None = None

    @property
    def waited_seconds(self) -> float:
        """That the host has waited for the GPU in decode steps so far."""
        return self._running.waited_seconds

    @property
    def max_length(self) -> int:
        """What the engines were built for; see `Backend.max_length`."""
        return self._running.engines.options.max_length

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph that has no cache; see `Backend.run`. bfloat16 comes back as float32."""
        return self._graphs.run(graph, inputs)

    def image_features(self, tiles: Sequence[Mapping[str, NDArray[Any]]]) -> DeviceRows:
        """Runs the image graphs; see `Backend.image_features`."""
        return self._graphs.image_features(tiles)

    def adopt_features(self, features: NDArray[np.floating[Any]]) -> DeviceRows:
        """Copies features to the GPU; see `Backend.adopt_features`."""
        return self._graphs.adopt_features(features)

    def embed_prompt(
        self,
        text_ids: NDArray[np.int64],
        image_mask: NDArray[np.bool_],
        features: Sequence[ImageFeatures],
    ) -> DeviceRows:
        """Embeds a prompt; see `Backend.embed_prompt`."""
        return self._graphs.embed_prompt(text_ids, image_mask, features)

    def start_tokens(
        self, samplers: Sequence[TokenSampler], max_length: int, suppressed: Sequence[int]
    ) -> DeviceTokenDecoding:
        """Makes an empty cache whose tokens are chosen on the GPU; see `Backend.start_tokens`."""
        with self._running.lock:
            state = self._take(len(samplers), max_length)
            return DeviceTokenDecoding(
                self._running,
                self._contexts,
                state,
                samplers,
                suppressed,
                self._give_back,
            )

    def start(self, batch: int, max_length: int) -> DeviceLogitDecoding:
        """Makes an empty cache whose logits come to the host; see `Backend.start`."""
        with self._running.lock:
            state = self._take(batch, max_length)
            dtype = self._manifest.graph("decoder").inputs[0].dtype
            return DeviceLogitDecoding(self._running, state, dtype, self._give_back)

    def start_slots(self, num_slots: int, cache_tokens: int) -> TensorRTSlots:
        """Preallocates a cache for sequences that join and leave; see `Backend.start_slots`."""
        with self._running.lock:
            return TensorRTSlots(
                self._running, self._contexts, self._manifest, num_slots, cache_tokens
            )

    def close(self) -> None:
        """Frees the GPU's memory; nothing may be asked of the backend any more."""
        with self._running.lock:
            if self._idle is not None:
                self._idle.close()
                self._idle = None
            self._running.close()

    def _take(self, batch: int, max_length: int) -> BatchState:
        if max_length > self.max_length:
            raise EngineError(too_long(max_length, self.max_length))
        state, self._idle = self._idle, None
        if state is not None and state.buffers.batch != batch:
            state.close()
            state = None
        if state is None:
            state = BatchState(self._running, self._contexts, self._manifest, batch)
        state.reset()
        return state

    def _give_back(self, state: BatchState) -> None:
        """Keeps the memory of one batch for the next of the same size, and no more."""
        with self._running.lock:
            if self._idle is not None:
                self._idle.close()
            self._idle = state
