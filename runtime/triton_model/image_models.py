"""Image features by the image models of the same server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import BundleError, VlmportError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.contract import GraphSpec, Manifest

__all__ = ["ImageModels"]


class ImageModels:
    """Computes a picture's features by Triton's business logic scripting (BLS).

    Args:
        backend: the module of Triton's Python backend.
        manifest: of the bundle.
        models: graph -> name of its model.

    Raises:
        BundleError: if an image graph has no model.
    """

    def __init__(self, backend: Any, manifest: Manifest, models: Mapping[str, str]) -> None:
        for graph in manifest.image_graphs:
            if graph not in models:
                msg = f"models: found none for {graph} in config.pbtxt; add its model's name"
                raise BundleError(msg)
        self._backend = backend
        self._hidden_size = manifest.dimensions.hidden_size
        self._graphs = [(manifest.graph(name), models[name]) for name in manifest.image_graphs]

    def __call__(self, tiles: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[Any]:
        """One picture's features [num_image_tokens, hidden_size].

        Args:
            tiles: of the picture; each alone, so that no result depends on its neighbours.

        Raises:
            VlmportError: if a model cannot answer.
        """
        features = [self._tile(tile) for tile in tiles]
        return np.concatenate([part.reshape(-1, self._hidden_size) for part in features])

    def _tile(self, tile: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        arrays = dict(tile)
        for graph, model in self._graphs:
            arrays |= self._run(graph, model, arrays)
        return arrays[self._graphs[-1][0].outputs[0].name]

    def _run(
        self, graph: GraphSpec, model: str, arrays: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        backend = self._backend
        outputs = [port.name for port in graph.outputs]
        request = backend.InferenceRequest(
            model_name=model,
            requested_output_names=outputs,
            inputs=[
                backend.Tensor(port.name, np.ascontiguousarray(arrays[port.name]))
                for port in graph.inputs
            ],
            # A model on a GPU may answer with tensors there, which numpy cannot read.
            preferred_memory=backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU),
        )
        try:
            response = request.exec()
        except backend.TritonModelException as error:
            raise VlmportError(f"model {model}: cannot be called ({error}); load it") from error
        if response.has_error():
            raise VlmportError(f"model {model}: {response.error().message()}")
        # Copied: the response's memory is Triton's.
        return {tensor.name(): tensor.as_numpy().copy() for tensor in response.output_tensors()}
