"""Streams of a Triton server that a test reads, leaves or loses."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Self

import numpy as np
import tritonclient.grpc

from vlmport.api.client import ask
from vlmport.errors import VlmportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from triton_server import TritonServer

    from vlmport.api.client_wire import AnswerPart
    from vlmport.runtime import Request

__all__ = ["GrpcCall", "HttpStream", "Stream"]

_SECONDS = 60.0


class Stream:
    """A gRPC stream that a thread of its own reads."""

    def __init__(self, server: TritonServer, model: str, request: Request) -> None:
        self.token_ids: list[int] = []
        self.finish_reason = ""
        self.error = ""
        self._is_left = False
        self._has_begun = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(server.grpc, model, request), daemon=True
        )
        self._thread.start()

    def begun(self) -> Self:
        """Waits for the first token."""
        assert self._has_begun.wait(_SECONDS), self.error
        return self

    def leave(self) -> None:
        """Hangs up with the next response."""
        self._is_left = True

    def ended(self, seconds: float = _SECONDS) -> Self:
        """Waits for the last response or an error."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"no end after {len(self.token_ids)} tokens"
        return self

    @property
    def is_running(self) -> bool:
        """Whether the last response is still to come."""
        return self._thread.is_alive()

    def _read(self, url: str, model: str, request: Request) -> None:
        try:
            ask(url, request, model=model, on_part=self._take)
        except VlmportError as error:
            self.error = str(error)
        except _LeftError:
            self.error = "left"
        self._has_begun.set()

    def _take(self, part: AnswerPart) -> None:
        self.token_ids += part.token_ids
        self.finish_reason = part.finish_reason
        self._has_begun.set()
        if self._is_left:
            raise _LeftError


class GrpcCall:
    """A request by gRPC that nobody reads, and that can be given up before it is answered."""

    def __init__(
        self,
        server: TritonServer,
        model: str,
        prompt: str,
        max_tokens: int,
        timeout_us: int | None = None,
    ) -> None:
        self._client = tritonclient.grpc.InferenceServerClient(server.grpc)
        self._client.start_stream(lambda result, error: None)
        tensor = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([prompt.encode()], np.object_))
        parameters = {"max_tokens": max_tokens}
        self._client.async_stream_infer(model, [tensor], timeout=timeout_us, parameters=parameters)

    def hang_up(self) -> None:
        """Ends the connection."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


class HttpStream:
    """The connection of a client of `generate_stream` that dies without a word."""

    def __init__(self, server: TritonServer, model: str, content: Mapping[str, object]) -> None:
        host, _, port = server.http.partition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=_SECONDS)
        body = json.dumps({**content, "stream": True}).encode()
        head = (
            f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: {server.http}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)

    def begun(self) -> Self:
        """Waits for the first bytes of an answer."""
        assert self._socket.recv(1000).startswith(b"HTTP/1.1 200")
        return self

    def hang_up(self) -> None:
        """Closes the connection."""
        self._socket.close()


class _LeftError(Exception):
    """Makes a reader go away."""
