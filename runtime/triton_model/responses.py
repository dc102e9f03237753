"""Answers and errors of vlmport -> responses of Triton."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import CancelledError, DeadlineError, InputError, QueueFullError
from vlmport.runtime.region_fields import region_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.runtime.request import GenerationResult
    from vlmport.runtime.triton_model.python_backend import ResponseSender

__all__ = ["Responses", "error_response"]


def error_response(backend: Any, error: Exception) -> object:
    """A response that carries an error's message and the code of Triton that fits it.

    Triton has no code for a deadline; its own queue's time-outs are UNAVAILABLE, too.
    """
    kinds = backend.TritonError
    code = kinds.INTERNAL
    if isinstance(error, InputError):
        code = kinds.INVALID_ARG
    elif isinstance(error, (QueueFullError, DeadlineError)):
        code = kinds.UNAVAILABLE
    elif isinstance(error, CancelledError):
        code = kinds.CANCELLED
    return backend.InferenceResponse(error=kinds(str(error), code))


class Responses:
    """The responses to one request.

    Args:
        backend: the module of Triton's Python backend.
        sender: the way back to the client.
    """

    def __init__(self, backend: Any, sender: ResponseSender) -> None:
        self._backend = backend
        self._sender = sender
        self._has_ended = False

    @property
    def is_cancelled(self) -> bool:
        """Whether the client has gone; False once the last response is sent.

        The server crashes (segmentation fault, Triton 2.51) where it is asked after that: it has
        freed what it looks at. So this and the last response belong into one thread.
        """
        return not self._has_ended and self._sender.is_cancelled()

    def piece(self, text: str, token_ids: Sequence[int]) -> None:
        """Sends a part of an answer that goes on.

        Nothing but that: each tensor of a response takes Triton time, while all answers wait for
        the processor.

        Args:
            text: new text.
            token_ids: new tokens.
        """
        tensors = self._tensors(text, token_ids)
        self._sender.send(self._backend.InferenceResponse(output_tensors=tensors))

    def last(
        self, text: str, token_ids: Sequence[int], result: GenerationResult, *, has_regions: bool
    ) -> None:
        """Sends the last part, or the whole of an answer.

        Args:
            text: of this part.
            token_ids: of this part.
            result: the whole answer.
            has_regions: whether answers of this model name regions of the picture.
        """
        counts = {
            "prompt_tokens": result.prompt_tokens,
            "image_tokens": result.image_tokens,
            "generated_tokens": result.generated_tokens,
        }
        tensors = [
            *self._tensors(text, token_ids),
            self._text("finish_reason", result.finish_reason),
            *(
                self._backend.Tensor(name, np.array([count], np.int64))
                for name, count in counts.items()
            ),
        ]
        if has_regions:
            regions = json.dumps([region_fields(region) for region in result.regions])
            tensors.append(self._text("regions", regions))
        self._end(self._backend.InferenceResponse(output_tensors=tensors))

    def error(self, error: Exception) -> None:
        """Ends the request with an error."""
        self._end(error_response(self._backend, error))

    def _end(self, response: object) -> None:
        self._has_ended = True
        self._sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _tensors(self, text: str, token_ids: Sequence[int]) -> list[object]:
        ids = self._backend.Tensor("token_ids", np.array(token_ids, np.int64))
        return [self._text("text_output", text), ids]

    def _text(self, name: str, text: str) -> object:
        return self._backend.Tensor(name, np.array([text.encode()], np.object_))
