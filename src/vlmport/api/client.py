"""Asks a model on a Triton server and gives back its answer."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmport.api.client_wire import wire_request
from vlmport.errors import InputError, ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from vlmport.api.client_wire import AnswerPart, Connection
    from vlmport.runtime.request import Request

__all__ = [
    "DEFAULT_MODEL",
    "ServedAnswer",
    "TimedAnswer",
    "ask",
    "check_model",
    "connected",
    "timed_answer",
]

DEFAULT_MODEL = "vlm"
CONNECT_SECONDS = 10.0
# A client that leaves at the moment at which the server ends its request learns nothing, and Triton
# 2.51 does not always survive it.
_GRACE_S = 1.0

_URL = re.compile(r"(?:(?P<scheme>[a-z]+)://)?(?P<address>(?:\[[0-9a-fA-F:]+\]|[^/:]+):\d+)/?")


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """A whole answer of a server; what a `GenerationResult` has, as far as the server tells.

    Attributes:
        text: without special tokens and without the stop string.
        token_ids: generated tokens.
        prompt_tokens: text and image tokens of the prompt.
        image_tokens: image tokens among them.
        generated_tokens: as the server counts them.
        finish_reason: "stop" or "length".
        ttft_ms: milliseconds from the request to its first token, as this client sees them.
        tokens_per_second: rate of the tokens after the first; 0.0 if there is only one.
        regions: parts of the picture that the answer names, in the form of `vlmport generate
            --json`; none if the family's answers have none.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    finish_reason: str
    ttft_ms: float
    tokens_per_second: float
    regions: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer and when its tokens came.

    Attributes:
        answer: whole.
        token_times: seconds of the clock, one a token; tokens of one response have one time.
    """

    answer: ServedAnswer
    token_times: tuple[float, ...]


def ask(
    url: str,
    request: Request,
    *,
    model: str = DEFAULT_MODEL,
    timeout_s: float | None = None,
    priority: int = 0,
    on_part: Callable[[AnswerPart], None] | None = None,
) -> ServedAnswer:
    """Asks a model on a server; for code that is not asynchronous.

    An exception, as of Ctrl-C or of `on_part`, cancels the request on the server.

    Args:
        url: host:port or grpc://host:port of gRPC, or http(s)://host:port.
        request: as for a local model.
        model: the main model's name.
        timeout_s: most seconds for the answer; the server is told of it. None for no limit.
        priority: smaller is begun first; 0 is the default; over HTTP alone.
        on_part: called with each response as it comes.

    Raises:
        ServerError: if the server is not there, has no such model, or refuses the request.
        InputError: if the URL, a picture, the priority or the time cannot be used.
    """
    wire = wire_request(request, priority=priority, timeout_s=timeout_s)

    async def answer() -> ServedAnswer:
        async with connected(url) as connection:
            await check_model(connection, url, model)
            parts = connection.stream(model, wire)
            timed = await timed_answer(parts, url, timeout_s=timeout_s, on_part=on_part)
            return timed.answer

    return asyncio.run(answer())


@asynccontextmanager
async def connected(
    url: str, connect_seconds: float = CONNECT_SECONDS
) -> AsyncIterator[Connection]:
    """A connection; leaving it cancels what is in flight.

    Args:
        url: see `ask`.
        connect_seconds: most seconds that the server may take for anything but an answer.

    Raises:
        InputError: if the URL is none of these.
        ModuleNotFoundError: without the extra `triton`.
    """
    found = _URL.fullmatch(url)
    scheme = (found["scheme"] or "grpc") if found else ""
    if found is None or scheme not in ("grpc", "http", "https"):
        msg = (
            f"url: found {url!r}; expected host:port, grpc://host:port, http://host:port or "
            "https://host:port"
        )
        if scheme == "grpcs":
            msg += "; gRPC over TLS is not offered; take the server's HTTP port by https://"
        raise InputError(msg)
    connection: Connection
    if scheme == "grpc":
        from vlmport.api.client_grpc import GrpcConnection

        connection = GrpcConnection(found["address"], connect_seconds)
    else:
        from vlmport.api.client_http import HttpConnection

        connection = HttpConnection(f"{scheme}://{found['address']}", connect_seconds)
    try:
        yield connection
    finally:
        await connection.close()


async def check_model(connection: Connection, url: str, model: str) -> None:
    """Tells before a request why it cannot be answered.

    Raises:
        ServerError: if the server is not there, has no such model, or has not loaded it.
    """
    await connection.describe()
    if await connection.is_ready(model):
        return
    models = await connection.models()
    if model in models:
        msg = (
            f"{url}: the model {model!r} is not ready ({models[model] or 'not loaded'}); wait until"
            " the server has loaded it, or see its log"
        )
        raise ServerError(msg, "UNAVAILABLE")
    known = ", ".join(sorted(models)) or "none"
    msg = f"{url}: found no model {model!r}; available: {known}; name one with --model"
    raise ServerError(msg, "NOT_FOUND")


async def timed_answer(
    parts: AsyncGenerator[AnswerPart],
    url: str,
    *,
    timeout_s: float | None = None,
    on_part: Callable[[AnswerPart], None] | None = None,
) -> TimedAnswer:
    """Takes the responses of a request as they come and puts them together.

    Args:
        parts: closed at the end, which cancels the request if it is not complete.
        url: for messages.
        timeout_s: most seconds for all of them; None for no limit. A server that was told of it has
            a second more to say so.
        on_part: called with each of them.

    Raises:
        ServerError: of the stream; if it ends early or takes too long.
    """
    clock = asyncio.get_running_loop().time
    started = clock()
    received: list[AnswerPart] = []
    times: list[float] = []
    limit = None if timeout_s is None else timeout_s + _GRACE_S
    try:
        async with asyncio.timeout(limit), aclosing(parts):
            async for part in parts:
                times += [clock()] * len(part.token_ids)
                received.append(part)
                if on_part is not None:
                    on_part(part)
    except TimeoutError as error:
        msg = f"{url}: found no complete answer within {timeout_s:g} s; allow more with --timeout"
        raise ServerError(msg, "TIMEOUT") from error
    if not received or not received[-1].finish_reason:
        msg = f"{url}: the stream ended before the answer did; see the server's log"
        raise ServerError(msg, "INCOMPLETE")
    return TimedAnswer(_whole(received, times, started), tuple(times))


def _whole(parts: list[AnswerPart], times: list[float], started: float) -> ServedAnswer:
    last = parts[-1]
    after_first = times[-1] - times[0] if times else 0.0
    return ServedAnswer(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        prompt_tokens=last.prompt_tokens,
        image_tokens=last.image_tokens,
        generated_tokens=last.generated_tokens,
        finish_reason=last.finish_reason,
        ttft_ms=1e3 * (times[0] - started) if times else 0.0,
        tokens_per_second=(len(times) - 1) / after_first if after_first > 0 else 0.0,
        regions=last.regions or (),
    )
