"""Records the true inputs of every graph of a float bundle, for quantizers that ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from vlmport.calibration.samples import load_samples
from vlmport.manifest import load_manifest
from vlmport.runtime import VisionLanguageModel
from vlmport.runtime.backends.host import HostBackend
from vlmport.runtime.backends.onnxruntime import open_session
from vlmport.runtime.kv_cache import GrowingCache

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import SlotDecoding

__all__ = ["record_inputs"]

_NEW_TOKENS = 16  # as many as `vlmport quantize` decodes of a sample


def record_inputs(bundle: Path, calibration: Path, folder: Path) -> dict[str, int]:
    """Asks a bundle the calibration questions and writes what each graph is given.

    Args:
        bundle: in float32.
        calibration: JSON lines of pictures and prompts, as `vlmport quantize` reads them.
        folder: gets <graph>/<number>.npz, one for each run of a graph: an array for each input.

    Returns:
        Graph name -> runs.
    """
    manifest = load_manifest(bundle)
    backend = _RecordingBackend(bundle, manifest, folder)
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    model = VisionLanguageModel(manifest, tokenizer, backend)
    for sample in load_samples(calibration):
        model.generate(
            prompt=sample.prompt,
            images=sample.images,
            max_new_tokens=sample.new_tokens or _NEW_TOKENS,
        )
    return backend.runs


class _RecordingBackend(HostBackend):
    """A `vlmport.runtime.backends.base.Backend` that keeps the inputs of every run in files."""

    name = "onnxruntime, recorded"

    def __init__(self, bundle: Path, manifest: Manifest, folder: Path) -> None:
        super().__init__(manifest)
        self.manifest = manifest
        self.runs = dict.fromkeys((graph.name for graph in manifest.graphs), 0)
        self._folder = folder
        self._sessions = {
            graph.name: open_session(bundle / graph.file, None, manifest.precision)
            for graph in manifest.graphs
        }

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph; see `Backend.run`."""
        spec = self.manifest.graph(graph)
        fed = {port.name: np.ascontiguousarray(inputs[port.name]) for port in spec.inputs}
        place = self._folder / graph
        place.mkdir(parents=True, exist_ok=True)
        # Before the run: ONNX Runtime may write the decoder's cache in place.
        np.savez(place / f"{self.runs[graph]:06d}.npz", **fed)  # type: ignore[arg-type]  # its stub
        self.runs[graph] += 1
        results: list[NDArray[Any]] = self._sessions[graph].run(None, fed)
        return {port.name: result for port, result in zip(spec.outputs, results, strict=True)}

    def start(self, batch: int, max_length: int) -> _RecordingDecoding:
        """Makes an empty cache; see `Backend.start`."""
        return _RecordingDecoding(self, GrowingCache(self.manifest.kv_layout, batch, max_length))

    def start_slots(self, num_slots: int, cache_tokens: int | None) -> SlotDecoding:
        """Not needed to ask questions."""
        raise NotImplementedError

    def with_graph(self, graph: str, path: Path) -> Self:
        """Not needed to ask questions."""
        raise NotImplementedError


class _RecordingDecoding:
    """A `vlmport.runtime.backends.base.Decoding` of one sequence, its cache handed in and out."""

    def __init__(self, backend: _RecordingBackend, cache: GrowingCache) -> None:
        self._backend = backend
        self._cache = cache
        self._length = 0
        self._past = backend.manifest.past_ports
        self._present = backend.manifest.present_ports

    def prefill(
        self, inputs_embeds: NDArray[np.floating[Any]], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the prompt in one piece; see `Decoding.prefill`."""
        return self._run(inputs_embeds[:, : int(lengths[0])])

    def step(self, token_ids: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Appends one token; see `Decoding.step`."""
        assert active.all()
        embeds = self._backend.run("embed_tokens", {"input_ids": token_ids[:, None]})
        return self._run(embeds["inputs_embeds"])

    def close(self) -> None:
        """Frees the cache; see `Decoding.close`."""
        self._cache.arrays.clear()

    def _run(self, inputs_embeds: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        start = self._length
        self._length += inputs_embeds.shape[1]
        self._cache.reserve(self._length, start)
        first = self._backend.manifest.attention.first_position
        fed: dict[str, NDArray[Any]] = {
            "inputs_embeds": inputs_embeds,
            "position_ids": np.arange(start, self._length, dtype=np.int64)[None] + first,
            "write_indices": np.array([start], np.int64),
            "valid_lengths": np.array([self._length], np.int64),
        }
        fed.update(zip(self._past, self._cache.arrays, strict=True))
        outputs = self._backend.run("decoder", fed)
        self._cache.arrays[:] = [outputs[name] for name in self._present]
        logits: NDArray[np.float32] = outputs["logits"]
        return logits
