"""A model that turns a picture into the inputs of the image graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import InputError, VlmportError
from vlmport.manifest import load_manifest
from vlmport.runtime.image_file import load_image
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.triton_model.pictures import encoded_picture
from vlmport.runtime.triton_model.python_backend import check_arrays, python_backend
from vlmport.runtime.triton_model.responses import error_response
from vlmport.runtime.triton_model.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.runtime.triton_model.python_backend import InferenceRequest

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """What Triton's Python backend makes one of for each instance; it gives the names."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads how the bundle wants its pictures."""
        self._backend = python_backend()
        check_arrays(self._backend)
        self._steps = load_manifest(read_settings(args).bundle).image

    def execute(self, requests: Sequence[InferenceRequest]) -> list[object]:
        """Answers requests; tiles of a picture lie along the first axis."""
        return [self._response(request) for request in requests]

    def _response(self, request: InferenceRequest) -> object:
        try:
            values = [bytes(one) for one in request.inputs()[0].as_numpy().reshape(-1)]
            if len(values) != 1:
                msg = f"image: found {len(values)} pictures; expected one in a request"
                raise InputError(msg)
            picture = load_image(encoded_picture(values[0], "image"))
            prepared = prepare_image(picture, self._steps)
        except VlmportError as error:
            return error_response(self._backend, error)
        tensor = self._backend.Tensor
        tensors = [
            tensor(name, np.ascontiguousarray(array)) for name, array in prepared.inputs.items()
        ]
        return self._backend.InferenceResponse(output_tensors=tensors)
