"""A server in this process that speaks Triton's protocols and answers by a script."""

from __future__ import annotations

import base64
import json
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

__all__ = ["Asked", "FakeTriton", "RefusalError", "answer_in_words", "response"]

# pb2 modules make their classes when they are imported; no checker sees them.
pb: Any = service_pb2
services: Any = service_pb2_grpc


@dataclass(frozen=True)
class Asked:
    """A request as it arrived, whatever carried it."""

    model: str
    inputs: dict[str, Any]
    parameters: dict[str, str]
    priority: int
    timeout_us: int | None


class RefusalError(Exception):
    """Raised by a script: the server answers with an error."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


Script = Callable[[Asked, threading.Event], Iterator[dict[str, Any]]]


def response(
    text: str, token_ids: list[int], finish_reason: str = "", **more: Any
) -> dict[str, Any]:
    """The outputs of one response."""
    counts = {"prompt_tokens": 12, "image_tokens": 9, "generated_tokens": len(token_ids)}
    outputs = {"text_output": text, "token_ids": token_ids, "finish_reason": finish_reason}
    return outputs | counts | more


def answer_in_words(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
    """Says the prompt again, a word a token."""
    words = asked.inputs["text_input"].split()
    for index, word in enumerate(words):
        text = word if index == 0 else f" {word}"
        yield response(text, [100 + index], generated_tokens=index + 1)
    yield response("", [2], "stop", generated_tokens=len(words) + 1)


@dataclass
class FakeTriton:
    """What the server knows and has seen.

    Attributes:
        script: answers; its event is set when the client has gone.
        models: name -> state, or the reason why it is not ready.
        asked: requests in the order of their arrival.
        cancelled: set when a client has gone before the end of its answer.
    """

    script: Script = answer_in_words
    models: dict[str, str] = field(default_factory=lambda: {"vlm": "READY"})
    asked: list[Asked] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def grpc(self) -> Iterator[str]:
        """Serves gRPC; gives the URL."""
        server = grpc.server(ThreadPoolExecutor(max_workers=40))
        services.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"grpc://127.0.0.1:{port}"
        finally:
            server.stop(None).wait()

    @contextmanager
    def http(self) -> Iterator[str]:
        """Serves HTTP; gives the URL."""
        fake = self

        class Handler(_Handler):
            triton = fake

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # with 5, the sixth of many clients waits for a second

        server = Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def index(self) -> list[tuple[str, str, str]]:
        """Name, state and reason of the models."""
        return [
            (name, state if state == "READY" else "UNAVAILABLE", "" if state == "READY" else state)
            for name, state in self.models.items()
        ]

    def answer(self, asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        """The script's answer."""
        self.asked.append(asked)
        return self.script(asked, gone)


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc] # untyped
    def __init__(self, triton: FakeTriton) -> None:
        self.triton = triton

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol names it)
        return pb.ServerLiveResponse(live=True)

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol names it)
        return pb.ServerMetadataResponse(name="fake", version="2.0")

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol names it)
        return pb.ModelReadyResponse(ready=self.triton.models.get(request.name) == "READY")

    def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol names it)
        listed = [
            pb.RepositoryIndexResponse.ModelIndex(name=name, state=state, reason=reason)
            for name, state, reason in self.triton.index()
        ]
        return pb.RepositoryIndexResponse(models=listed)

    def ModelStreamInfer(  # noqa: N802 (the protocol names it)
        self, request_iterator: Any, context: Any
    ) -> Iterator[Any]:
        gone = threading.Event()
        is_whole = False

        def ended() -> None:
            gone.set()
            if not is_whole:
                self.triton.cancelled.set()

        context.add_callback(ended)
        for request in request_iterator:
            try:
                for outputs in self.triton.answer(_asked(request), gone):
                    yield pb.ModelStreamInferResponse(infer_response=_tensors(outputs))
            except RefusalError as refusal:
                is_whole = True
                yield pb.ModelStreamInferResponse(error_message=refusal.message)
        is_whole = True


def _asked(request: Any) -> Asked:
    inputs: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        inputs[tensor.name] = bool(raw[0]) if tensor.datatype == "BOOL" else _byte_texts(raw)
    for name in ("text_input", "messages"):
        if name in inputs:
            inputs[name] = inputs[name][0].decode()
    if "stop" in inputs:
        inputs["stop"] = [text.decode() for text in inputs["stop"]]
    values = {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in request.parameters.items()
    }
    priority, timeout = values.pop("priority", 0), values.pop("timeout", None)
    parameters = {name: str(value) for name, value in values.items()}
    return Asked(request.model_name, inputs, parameters, priority, timeout)


def _byte_texts(raw: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def _tensors(outputs: dict[str, Any]) -> Any:
    message = pb.ModelInferResponse(model_name="vlm", model_version="1")
    for name, value in outputs.items():
        values = value if isinstance(value, list) else [value]
        is_text = isinstance(value, str)
        message.outputs.add(
            name=name, datatype="BYTES" if is_text else "INT64", shape=[len(values)]
        )
        if is_text:
            raw = value.encode()
            message.raw_output_contents.append(struct.pack("<I", len(raw)) + raw)
        else:
            message.raw_output_contents.append(struct.pack(f"<{len(values)}q", *values))
    return message


class _Handler(BaseHTTPRequestHandler):
    triton: FakeTriton
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each event at once

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the test's output clean."""

    def do_GET(self) -> None:
        if self.path == "/v2/health/live":
            self._reply(200, None)
        elif self.path == "/v2":
            self._reply(200, {"name": "fake", "version": "2.0"})
        else:
            name = self.path.split("/")[3]
            self._reply(200 if self.triton.models.get(name) == "READY" else 400, None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/v2/repository/index":
            self._reply(
                200,
                [
                    {"name": name, "state": state, "reason": reason}
                    for name, state, reason in self.triton.index()
                ],
            )
        else:
            self._generate(self.path.split("/")[3], json.loads(body))

    def _generate(self, model: str, body: dict[str, Any]) -> None:
        gone = threading.Event()
        has_begun = False
        try:
            for outputs in self.triton.answer(_asked_json(model, body), gone):
                if not has_begun:
                    self._begin("text/event-stream", None)
                    has_begun = True
                self._event(_scalars(outputs))
        except RefusalError as refusal:
            if has_begun:
                self._event({"error": refusal.message})
            else:
                self._refuse(refusal.message)
        except OSError:  # the client has gone
            gone.set()
            self.triton.cancelled.set()
        self.close_connection = True

    def _event(self, fields: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(fields)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, message: str) -> None:
        """As Triton 2.51 refuses: 400 for every kind of error, and an event for a body."""
        body = f"data: {json.dumps({'error': message})}\n\n".encode()
        self._begin("text/event-stream", len(body), 400)
        self.wfile.write(body)

    def _reply(self, status: int, value: Any) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self._begin("application/json", len(body), status)
        self.wfile.write(body)

    def _begin(self, kind: str, length: int | None, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()


def _asked_json(model: str, body: dict[str, Any]) -> Asked:
    names = ("text_input", "messages", "image", "stop", "stream")
    inputs = {name: body.pop(name) for name in names if name in body}
    if "image" in inputs:
        inputs["image"] = [base64.b64decode(image, validate=True) for image in inputs["image"]]
    priority, timeout = body.pop("priority", 0), body.pop("timeout", None)
    return Asked(model, inputs, body, priority, timeout)


def _scalars(outputs: dict[str, Any]) -> dict[str, Any]:
    """As Triton writes JSON: a tensor of one element without brackets."""
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in outputs.items()
    }
