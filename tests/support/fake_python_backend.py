"""A stand-in for the module of Triton's Python backend, for models outside of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FakeBackend", "FakeError", "FakeRequest", "FakeResponse", "FakeSender", "FakeTensor"]


class FakeTensor:
    """A named array; `as_numpy` gives it back as it is."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    @classmethod
    def from_dlpack(cls, name: str, array: NDArray[Any]) -> FakeTensor:
        return cls(name, array)

    def to_dlpack(self) -> NDArray[Any]:
        return self._array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class FakeError:
    """An error with a code."""

    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = range(4)

    def __init__(self, message: str, code: int) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class FakeResponse:
    """Tensors or an error."""

    def __init__(
        self, output_tensors: Sequence[FakeTensor] = (), error: FakeError | None = None
    ) -> None:
        self._tensors, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> FakeError:
        assert self._error is not None
        return self._error

    def output_tensors(self) -> list[FakeTensor]:
        return self._tensors

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tensors by name."""
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}


class FakeBackend:
    """The names that vlmport uses."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Tensor = FakeTensor
    TritonError = FakeError
    InferenceResponse = FakeResponse


class FakeSender:
    """Keeps what is sent; asked after the last response it fails as a real server crashes."""

    def __init__(self) -> None:
        self.sent: list[FakeResponse] = []
        self.has_ended = False

    def send(self, response: object = None, *, flags: int = 0) -> None:
        assert isinstance(response, FakeResponse)
        assert not self.has_ended
        self.sent.append(response)
        self.has_ended = bool(flags)

    def is_cancelled(self) -> bool:
        assert not self.has_ended
        return False


class FakeRequest:
    """A request with texts and flags as inputs."""

    def __init__(
        self, inputs: Mapping[str, object] | None = None, parameters: str = "{}", timeout: int = 0
    ) -> None:
        self._inputs, self._parameters, self._timeout = inputs or {}, parameters, timeout
        self.sender = FakeSender()

    def inputs(self) -> list[FakeTensor]:
        return [FakeTensor(name, _array(value)) for name, value in self._inputs.items()]

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return self._timeout

    def get_response_sender(self) -> FakeSender:
        return self.sender


def _array(value: object) -> NDArray[Any]:
    if isinstance(value, bool):
        return np.array([value])
    values = value if isinstance(value, list) else [value]
    return np.array([one.encode() if isinstance(one, str) else one for one in values], np.object_)
