"""A way to a server by gRPC, with NVIDIA's tritonclient."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from vlmport.api.client_wire import AnswerPart, ServerDescription, part_of
from vlmport.errors import InputError, ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from vlmport.api.client_wire import WireRequest

__all__ = ["GrpcConnection"]

_STATUS_PREFIX = "StatusCode."


class GrpcConnection:
    """See `Connection`.

    Args:
        address: host and port.
        timeout_s: most seconds that the server may take for anything but an answer.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._where = f"grpc://{address}"
        self._timeout_s = timeout_s
        # gRPC would share one connection among all clients of a process that name one server.
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        # Without annotations; a checker takes what its methods return for None.
        self._client: Any = InferenceServerClient(address, channel_args=options)

    async def describe(self) -> ServerDescription:
        """See `Connection.describe`."""
        async with self._errors():
            is_live = await self._client.is_server_live(client_timeout=self._timeout_s)
            found = await self._client.get_server_metadata(client_timeout=self._timeout_s)
        if not is_live:
            raise ServerError(f"{self._where}: the server says that it is not live", "UNAVAILABLE")
        return ServerDescription(found.name, found.version)

    async def models(self) -> dict[str, str]:
        """See `Connection.models`."""
        async with self._errors():
            index = await self._client.get_model_repository_index(client_timeout=self._timeout_s)
        return {model.name: model.reason or model.state for model in index.models}

    async def is_ready(self, model: str) -> bool:
        """See `Connection.is_ready`."""
        async with self._errors():
            ready = await self._client.is_model_ready(model, client_timeout=self._timeout_s)
        return bool(ready)

    async def stream(self, model: str, request: WireRequest) -> AsyncGenerator[AnswerPart]:
        """See `Connection.stream`."""
        # Without the header "triton_grpc_error", by which an error would tell its code: with it
        # Triton 2.51 crashed more often, see docs/triton-model.md.
        call = self._client.stream_infer(_one(_arguments(model, request)))
        refusal: InferenceServerException | None = None
        try:
            async with self._errors():
                # To the end of the stream also behind an error: what is cancelled while the server
                # ends it may crash Triton 2.51.
                async for result, error in call:
                    refusal = refusal or error
                    values = {} if error is not None else _values(result)
                    if values:
                        yield part_of(values, self._where)
                if refusal is not None:
                    raise refusal
        finally:
            call.cancel()

    async def close(self) -> None:
        """See `Connection.close`."""
        await self._client.close()

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """Turns the two kinds of errors of the libraries into ours."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._error(error.details() or "no details", error.code().name) from error
        except InferenceServerException as error:
            status = (error.status() or "").removeprefix(_STATUS_PREFIX)
            raise self._error(error.message(), status) from error

    def _error(self, message: str, status: str) -> ServerError:
        words = f" ({status})" if status else ""
        return ServerError(f"{self._where}: {message}{words}", status or "UNKNOWN")


async def _one(arguments: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield arguments


def _arguments(model: str, request: WireRequest) -> dict[str, Any]:
    if request.priority:
        # Triton takes it for itself, and its Python backend does not show it to models (2.51); the
        # HTTP endpoint generate_stream hands it on.
        msg = (
            f"priority: found {request.priority}; over gRPC the model does not learn of it; use "
            "the URL of the HTTP port, or leave it out"
        )
        raise InputError(msg)
    inputs = [_flag("stream", True)]
    if request.text_input is not None:
        inputs.append(_bytes("text_input", [request.text_input.encode()]))
    if request.messages is not None:
        inputs.append(_bytes("messages", [request.messages.encode()]))
    if request.images:
        inputs.append(_bytes("image", request.images))
    if request.stop:
        inputs.append(_bytes("stop", [text.encode() for text in request.stop]))
    return {
        "model_name": model,
        "inputs": inputs,
        "timeout": request.timeout_us,
        "parameters": dict(request.parameters),
    }


def _bytes(name: str, values: Sequence[bytes]) -> Any:
    tensor = InferInput(name, [len(values)], "BYTES")
    return tensor.set_data_from_numpy(np.array(values, np.object_))


def _flag(name: str, value: bool) -> Any:
    return InferInput(name, [1], "BOOL").set_data_from_numpy(np.array([value]))


def _values(result: Any) -> dict[str, Any]:
    """Output -> its value: text and counts alone, token ids as a list; {} for an empty response."""
    values: dict[str, Any] = {}
    for tensor in result.get_response().outputs:
        array = result.as_numpy(tensor.name)
        if array is None or (array.size == 0 and tensor.name != "token_ids"):
            continue
        if tensor.name == "token_ids":
            values[tensor.name] = [int(token) for token in array.reshape(-1)]
        else:
            value = array.reshape(-1)[0]
            values[tensor.name] = value.decode() if isinstance(value, bytes) else int(value)
    return values
