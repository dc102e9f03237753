"""What backends share whose arrays are numpy arrays."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.host_prompt import HostRows, fuse_image_features
from vlmport.runtime.host_tokens import HostTokenDecoding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import Decoding, ImageFeatures, SlotDecoding
    from vlmport.runtime.sampling import TokenSampler

__all__ = ["HostBackend"]


class HostBackend(ABC):
    """A `vlmport.runtime.backends.base.Backend` that hands out arrays; subclasses run graphs.

    Args:
        manifest: the bundle's.
    """

    name: str

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        # Pictures of several threads take turns: they would share the same cores, and each would
        # need the memory of the image graphs' inner values, which ONNX Runtime keeps.
        self._image_turn = threading.Lock()

    @property
    def max_length(self) -> int:
        """The bundle's limit; see `Backend.max_length`."""
        return self._manifest.dimensions.max_length

    @abstractmethod
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph that has no cache; see `Backend.run`."""

    @abstractmethod
    def start(self, batch: int, max_length: int) -> Decoding:
        """Makes an empty cache; see `Backend.start`."""

    @abstractmethod
    def start_slots(self, num_slots: int, cache_tokens: int) -> SlotDecoding:
        """Preallocates a cache for sequences that join and leave; see `Backend.start_slots`."""

    def image_features(self, tiles: Sequence[Mapping[str, NDArray[Any]]]) -> HostRows:
        """Runs the image graphs on each tile; see `Backend.image_features`."""
        with self._image_turn:
            features = np.concatenate([self._tile_features(tile) for tile in tiles])
        return HostRows(features.reshape(-1, self._manifest.dimensions.hidden_size))

    def adopt_features(self, features: NDArray[np.floating[Any]]) -> HostRows:
        """Takes features that were computed elsewhere; see `Backend.adopt_features`."""
        return HostRows(features)

    def _tile_features(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.floating[Any]]:
        arrays = dict(inputs)
        for graph in self._manifest.image_graphs:
            arrays.update(self.run(graph, arrays))
        features: NDArray[np.floating[Any]] = arrays["image_features"]
        return features

    def embed_prompt(
        self,
        text_ids: NDArray[np.int64],
        image_mask: NDArray[np.bool_],
        features: Sequence[ImageFeatures],
    ) -> HostRows:
        """Embeds a prompt and puts image features in place; see `Backend.embed_prompt`."""
        embeds = self.run("embed_tokens", {"input_ids": text_ids[None]})["inputs_embeds"][0]
        return HostRows(fuse_image_features(embeds, image_mask, features))

    def start_tokens(
        self, samplers: Sequence[TokenSampler], max_length: int, suppressed: Sequence[int]
    ) -> HostTokenDecoding:
        """Makes an empty cache; tokens are chosen on the host; see `Backend.start_tokens`."""
        return HostTokenDecoding(self.start(len(samplers), max_length), samplers, suppressed)
