"""What is used of Triton's Python backend, which exists inside of a server alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlmport.errors import VlmportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "InferenceRequest",
    "ResponseSender",
    "Tensor",
    "TritonError",
    "check_arrays",
    "python_backend",
]


class Tensor(Protocol):
    """A named array; texts are bytes in an array of objects."""

    def name(self) -> str:
        """As config.pbtxt has it."""
        ...

    def as_numpy(self) -> NDArray[Any]:
        """The array, which may lie in memory that Triton takes back."""
        ...


class TritonError(Protocol):
    """An error of Triton."""

    def code(self) -> int:
        """One of the class's constants."""
        ...

    def message(self) -> str:
        """What is told to the client."""
        ...


class ResponseSender(Protocol):
    """The way back to the client of one request; any thread may use it."""

    def send(self, response: object = None, *, flags: int = 0) -> None:
        """Sends a response, or none but the flags."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the client has gone or has taken its request back.

        Asks the server, another process: 30 to 120 microseconds (Triton 2.51).
        """
        ...


class InferenceRequest(Protocol):
    """A request of a client."""

    def inputs(self) -> Sequence[Tensor]:
        """Those that the client gave."""
        ...

    def parameters(self) -> str:
        """A JSON object."""
        ...

    def timeout(self) -> int:
        """Microseconds; 0 for no limit."""
        ...

    def get_response_sender(self) -> ResponseSender:
        """For the responses of a decoupled model."""
        ...


def python_backend() -> Any:  # classes of C++ without types
    """The module that Triton's Python backend puts into the process of a model.

    Raises:
        VlmportError: outside of a server.
    """
    try:
        return importlib.import_module("triton_python_backend_utils")
    except ImportError as error:
        msg = (
            "triton_python_backend_utils: not found; expected the process of a Python model inside "
            "of a Triton server; load the repository with tritonserver"
        )
        raise VlmportError(msg) from error


def check_arrays(backend: Any) -> None:
    """Makes sure that arrays cross the border between Python and Triton as they are.

    The stub of Triton 2.51 is built for numpy 1. With numpy 2.4 it starts without a word and reads
    wrong strides: [1, 2, 3] arrives as [1, 1, 1].

    Raises:
        VlmportError: if they do not.
    """
    sent = np.array([1.0, 2.0, 3.0], np.float32)
    tensor = backend.Tensor("known", sent)
    arrived = backend.Tensor.from_dlpack("known", tensor.to_dlpack()).as_numpy()
    if arrived.dtype != sent.dtype or not np.array_equal(arrived, sent):
        msg = (
            f"numpy {np.__version__}: arrays do not survive Triton's Python backend "
            f"({sent.tolist()} arrived as {arrived.tolist()}); expected a numpy that the server's "
            "stub was built for; install numpy below 2 (1.26) in the server's Python"
        )
        raise VlmportError(msg)
