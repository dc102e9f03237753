"""The main model of a repository: questions and pictures in, a stream of text out."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from vlmport.contract_engines import ENGINES_NAME
from vlmport.errors import EngineError, VlmportError
from vlmport.manifest import load_manifest
from vlmport.runtime.model import VisionLanguageModel
from vlmport.runtime.serving.service import GenerationService
from vlmport.runtime.triton_model.answering import Answering
from vlmport.runtime.triton_model.call import read_call
from vlmport.runtime.triton_model.image_models import ImageModels
from vlmport.runtime.triton_model.python_backend import check_arrays, python_backend
from vlmport.runtime.triton_model.responses import Responses
from vlmport.runtime.triton_model.serving_metrics import ServingMetrics
from vlmport.runtime.triton_model.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.runtime.triton_model.python_backend import InferenceRequest
    from vlmport.runtime.triton_model.settings import ModelSettings

__all__ = ["TritonPythonModel"]

_log = logging.getLogger(__name__)
_MOST_PREPARING = 4


class TritonPythonModel:
    """What Triton's Python backend makes one of for each instance; it gives the names.

    Source: https://github.com/triton-inference-server/python_backend#usage.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the bundle; an error is shown by the server, and the model is not served."""
        self._backend = python_backend()
        check_arrays(self._backend)
        settings = read_settings(args)
        model = _open(self._backend, settings)
        service = GenerationService(model, settings.serving)
        labels = {"model": settings.name, "version": settings.version}
        self._answering = Answering(
            service,
            ServingMetrics(self._backend, labels),
            threads=max(1, min(_MOST_PREPARING, os.cpu_count() or 1)),
            has_regions=model.manifest.answers.kind != "text",
        )

    def execute(self, requests: Sequence[InferenceRequest]) -> None:
        """Takes requests and returns at once, so that the next ones can come."""
        for incoming in requests:
            responses = Responses(self._backend, incoming.get_response_sender())
            try:
                # First, so that an empty request, which probes send, is told of it, too.
                self._answering.check_is_open()
                call = read_call(incoming)
            except VlmportError as error:
                responses.error(error)
            except Exception as error:  # ends this request alone
                _log.exception("a request cannot be read")
                responses.error(VlmportError(f"request: {type(error).__name__}: {error}"))
            else:
                self._answering.begin(call, responses)

    def finalize(self) -> None:
        """Ends what still runs; Triton waits for running answers before it calls this."""
        self._answering.close()


def _open(backend: Any, settings: ModelSettings) -> VisionLanguageModel:
    features = None
    if settings.calls_image_models:
        features = ImageModels(backend, load_manifest(settings.bundle), settings.models)
    if settings.engines is not None and not (settings.engines / ENGINES_NAME).is_file():
        msg = (
            f"{settings.engines}: found no engines; expected those of this TensorRT and this GPU; "
            "run build_engines.sh of the repository here"
        )
        raise EngineError(msg)
    try:
        return VisionLanguageModel.load(
            settings.bundle,
            backend=settings.runtime_backend,
            engines=settings.engines,
            threads=settings.threads,
            image_features=features,
        )
    except EngineError as error:
        msg = f"{error}; in a model repository build_engines.sh does that"
        raise EngineError(msg) from error
