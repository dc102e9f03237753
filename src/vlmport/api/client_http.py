"""A way to a server by HTTP: the endpoint `generate_stream`, plain JSON."""

from __future__ import annotations

import base64
import json
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp

from vlmport.api.client_wire import AnswerPart, ServerDescription, part_of
from vlmport.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from vlmport.api.client_wire import WireRequest

__all__ = ["HttpConnection"]

_EVENT = b"data:"
# A line of an answer may hold the masks of a whole picture; aiohttp refuses longer ones.
_LINE_BYTES = 16 << 20


class HttpConnection:
    """See `Connection`.

    Args:
        url: with its scheme, "http" or "https".
        timeout_s: most seconds for a connection, and for anything but an answer.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._where = url
        self._short = aiohttp.ClientTimeout(total=timeout_s, sock_connect=timeout_s)
        self._long = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s)
        # As many requests at once as are asked for, and not a hundred.
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=_LINE_BYTES)

    async def describe(self) -> ServerDescription:
        """See `Connection.describe`."""
        status = await self._status("GET", "/v2/health/live")
        if status != HTTPStatus.OK:
            msg = (
                f"{self._where}: /v2/health/live answers HTTP {status}; expected a Triton server's"
                " HTTP port, and the server live"
            )
            raise ServerError(msg, "UNAVAILABLE")
        found = await self._json("GET", "/v2")
        return ServerDescription(str(found.get("name", "")), str(found.get("version", "")))

    async def models(self) -> dict[str, str]:
        """See `Connection.models`."""
        index = await self._json("POST", "/v2/repository/index")
        return {
            model["name"]: model.get("reason") or model.get("state", "NOT READY") for model in index
        }

    async def is_ready(self, model: str) -> bool:
        """See `Connection.is_ready`."""
        return await self._status("GET", f"{_path(model)}/ready") == HTTPStatus.OK

    async def stream(self, model: str, request: WireRequest) -> AsyncGenerator[AnswerPart]:
        """See `Connection.stream`; the server cancels when the connection is closed."""
        url = f"{self._where}{_path(model)}/generate_stream"
        body = _body(request)
        async with (
            self._errors(),
            self._session.post(url, json=body, timeout=self._long) as response,
        ):
            if response.status != HTTPStatus.OK:
                raise self._refusal(await response.read(), response.status)
            try:
                async for line in response.content:
                    if line.startswith(_EVENT):
                        yield self._part(line.removeprefix(_EVENT))
            finally:
                if not response.content.at_eof():
                    response.close()

    async def close(self) -> None:
        """See `Connection.close`."""
        await self._session.close()

    async def _status(self, method: str, path: str) -> int:
        async with (
            self._errors(),
            self._session.request(method, self._where + path, timeout=self._short) as response,
        ):
            await response.read()
            return response.status

    async def _json(self, method: str, path: str) -> Any:
        async with (
            self._errors(),
            self._session.request(method, self._where + path, timeout=self._short) as response,
        ):
            body = await response.read()
            if response.status != HTTPStatus.OK:
                raise self._refusal(body, response.status)
            return self._parsed(body)

    def _part(self, text: bytes) -> AnswerPart:
        fields = self._parsed(text)
        if "error" in fields:
            raise ServerError(f"{self._where}: {fields['error']}", "UNKNOWN")
        tokens = fields.get("token_ids")
        if isinstance(tokens, int):  # Triton writes a tensor of one element without brackets
            fields["token_ids"] = [tokens]
        return part_of(fields, self._where)

    def _parsed(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            msg = f"{self._where}: found {text[:60]!r}; expected JSON, as a Triton server answers"
            raise ServerError(msg, "NOT_OURS") from error

    def _refusal(self, body: bytes, status: int) -> ServerError:
        """What a status other than 200 says.

        Triton 2.51 answers 400 for whatever a model refuses, so the status tells little.
        """
        try:
            message = json.loads(body.strip().removeprefix(_EVENT))["error"]
        except (ValueError, KeyError, TypeError):
            message = body[:200].decode(errors="replace").strip() or "no message"
        return ServerError(f"{self._where}: {message} (HTTP {status})", f"HTTP_{status}")

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """Turns the errors of the library into ours."""
        try:
            yield
        except aiohttp.ServerTimeoutError as error:
            msg = f"{self._where}: no connection within the time for it"
            raise ServerError(msg, "UNAVAILABLE") from error
        except TimeoutError as error:
            msg = f"{self._where}: no answer within the time for it"
            raise ServerError(msg, "UNAVAILABLE") from error
        except (aiohttp.ClientError, ValueError) as error:
            msg = f"{self._where}: {error or type(error).__name__}"
            raise ServerError(msg, "UNAVAILABLE") from error


def _path(model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}"


def _body(request: WireRequest) -> dict[str, Any]:
    """The JSON of a request; what is not an input becomes a parameter on the server."""
    # Numbers as text: not every Triton takes a fraction as a parameter in JSON.
    body: dict[str, Any] = {name: str(value) for name, value in request.parameters.items()}
    body["stream"] = True
    if request.text_input is not None:
        body["text_input"] = request.text_input
    if request.messages is not None:
        body["messages"] = request.messages
    if request.images:
        body["image"] = [base64.b64encode(image).decode() for image in request.images]
    if request.stop:
        body["stop"] = list(request.stop)
    if request.priority:
        body["priority"] = request.priority
    if request.timeout_us is not None:
        body["timeout"] = request.timeout_us
    return body
