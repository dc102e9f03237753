"""A model that runs one graph of the bundle: a vision encoder, a projector, an embedding."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import VlmportError
from vlmport.manifest import load_manifest, verify_files
from vlmport.runtime.backends.opening import open_backend
from vlmport.runtime.triton_model.python_backend import check_arrays, python_backend
from vlmport.runtime.triton_model.responses import error_response
from vlmport.runtime.triton_model.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.runtime.triton_model.python_backend import InferenceRequest

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """What Triton's Python backend makes one of for each instance; it gives the names."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the graph; an error is shown by the server, and the model is not served."""
        self._backend = python_backend()
        check_arrays(self._backend)
        settings = read_settings(args)
        self._is_batched = settings.max_batch_size > 0
        manifest = load_manifest(settings.bundle)
        self._spec = manifest.graph(settings.graph)
        others = [graph.name for graph in manifest.graphs if graph.name != settings.graph]
        verify_files(settings.bundle, manifest, hashes=True, elsewhere=others)
        backend = open_backend(
            settings.runtime_backend,
            settings.bundle,
            manifest,
            threads=settings.threads,
            engines=settings.engines,
            elsewhere=others,
        )
        self._run = partial(backend.run, settings.graph)

    def execute(self, requests: Sequence[InferenceRequest]) -> list[object]:
        """Answers requests, each as it would be answered alone."""
        return [self._response(request) for request in requests]

    def _response(self, request: InferenceRequest) -> object:
        try:
            outputs = self._outputs({one.name(): one.as_numpy() for one in request.inputs()})
        except VlmportError as error:
            return error_response(self._backend, error)
        except Exception as error:  # of the engine, which has errors of its own
            return error_response(
                self._backend, VlmportError(f"{self._spec.name}: {error}; check the inputs' shapes")
            )
        tensor = self._backend.Tensor
        tensors = [tensor(name, array) for name, array in outputs.items()]
        return self._backend.InferenceResponse(output_tensors=tensors)

    def _outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the graph.

        Rows of a batch run one by one: a row's result must not depend on its neighbours, and the
        kernels of a CPU round differently in batches of different sizes.
        """
        if not self._is_batched:
            return self._run(inputs)
        rows = len(next(iter(inputs.values())))
        results = [
            self._run({name: array[row : row + 1] for name, array in inputs.items()})
            for row in range(rows)
        ]
        return {name: np.concatenate([one[name] for one in results]) for name in results[0]}
