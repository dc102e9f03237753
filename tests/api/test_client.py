from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image
from support.fake_triton import Asked, FakeTriton, RefusalError, answer_in_words, response

from vlmport.api.client import ask, check_model, connected
from vlmport.api.client_wire import wire_request
from vlmport.errors import InputError, ServerError
from vlmport.runtime.messages import ImagePart, Message, TextPart
from vlmport.runtime.request import Request
from vlmport.runtime.sampling import SamplingOptions

SECONDS = 5.0  # far more than anything here takes
HELLO = Request(prompt="hello big world")

Serve = Callable[[FakeTriton], AbstractContextManager[str]]


@pytest.fixture(params=["grpc", "http"])
def serve(request: pytest.FixtureRequest) -> Serve:
    name: str = request.param
    return lambda triton: getattr(triton, name)()


def failure(url: str, request: Request = HELLO, **more: Any) -> ServerError:
    with pytest.raises(ServerError) as caught:
        ask(url, request, **more)
    return caught.value


def test_an_answer_comes_in_parts_and_whole(serve: Serve) -> None:
    triton, parts = FakeTriton(), []
    with serve(triton) as url:
        answer = ask(url, HELLO, on_part=lambda part: parts.append(part.text))
    assert parts == ["hello", " big", " world", ""]
    assert (answer.text, answer.token_ids) == ("hello big world", (100, 101, 102, 2))
    assert (answer.finish_reason, answer.generated_tokens) == ("stop", 4)
    assert (answer.prompt_tokens, answer.image_tokens, answer.regions) == (12, 9, ())
    assert answer.ttft_ms > 0
    assert answer.tokens_per_second > 0


def test_a_request_arrives_as_it_was_asked(serve: Serve, tmp_path: Path) -> None:
    triton, drawn = FakeTriton(), Image.new("RGB", (3, 2), "red")
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8 a file as it is")
    request = Request(
        prompt="what?",
        images=(tmp_path / "picture.jpg", drawn),
        max_new_tokens=7,
        stop_strings=("\n", "end"),
        sampling=SamplingOptions(temperature=0.5, top_k=3, seed=9, presence_penalty=-0.5),
    )
    with serve(triton) as url:
        ask(url, request, model="vlm", timeout_s=4.0)
    [asked] = triton.asked
    file, picture = asked.inputs.pop("image")
    assert file == b"\xff\xd8 a file as it is"
    assert Image.open(io.BytesIO(picture)).tobytes() == drawn.tobytes()
    assert asked.inputs == {"text_input": "what?", "stop": ["\n", "end"], "stream": True}
    assert asked.parameters == {
        "max_tokens": "7",
        "temperature": "0.5",
        "top_k": "3",
        "seed": "9",
        "presence_penalty": "-0.5",
    }
    assert (asked.model, asked.timeout_us) == ("vlm", 4_000_000)


def test_a_priority_goes_where_the_model_learns_of_it() -> None:
    triton = FakeTriton()
    with triton.http() as url:
        ask(url, HELLO, priority=2)
    with triton.grpc() as url, pytest.raises(InputError, match=r"over gRPC the model does not"):
        ask(url, HELLO, priority=2)
    assert [asked.priority for asked in triton.asked] == [2]


def test_only_what_was_asked_for_is_sent(serve: Serve) -> None:
    triton = FakeTriton()
    with serve(triton) as url:
        ask(url, HELLO)
    assert triton.asked == [
        Asked("vlm", {"text_input": "hello big world", "stream": True}, {}, 0, None)
    ]


def test_a_chat_goes_without_the_paths_of_this_machine(serve: Serve) -> None:
    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        yield response(asked.inputs["messages"], [1], "length")

    chat = (Message("user", (ImagePart("/home/me/cat.png"), TextPart("what, ähm?"))),)
    with serve(FakeTriton(script)) as url:
        answer = ask(url, Request(messages=chat, images=(b"cat",)))
    assert answer.text == (
        '[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what, ähm?"}]}]'
    )
    assert answer.finish_reason == "length"


def test_regions_come_with_the_last_response(serve: Serve) -> None:
    region = '[{"label": "cat", "box": {"left": 1, "top": 2, "right": 3, "bottom": 4}}]'

    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        yield response("cat", [5, 6])
        yield response("", [], "stop", regions=region, generated_tokens=2)

    with serve(FakeTriton(script)) as url:
        answer = ask(url, HELLO)
    assert answer.regions[0]["label"] == "cat"
    assert answer.token_ids == (5, 6)


def test_the_servers_message_reaches_the_user(serve: Serve) -> None:
    with serve(FakeTriton(refuse("max_tokens: found -1; expected 1 or more"))) as url:
        error = failure(url)
    # A stream of gRPC carries no status of a model's error; see client_grpc.
    status, words = ("UNKNOWN", "") if url.startswith("grpc") else ("HTTP_400", " (HTTP 400)")
    assert str(error) == f"{url}: max_tokens: found -1; expected 1 or more{words}"
    assert error.kind == status


def test_an_error_in_the_middle_of_an_answer_is_one(serve: Serve) -> None:
    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        yield response("begun", [1])
        raise RefusalError("request: not answered in time")

    parts: list[str] = []
    with serve(FakeTriton(script)) as url:
        error = failure(url, on_part=lambda part: parts.append(part.text))
    assert "request: not answered in time" in str(error)
    assert parts == ["begun"]


def test_a_stream_that_ends_early_is_no_answer(serve: Serve) -> None:
    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        yield response("begun", [1])

    with serve(FakeTriton(script)) as url:
        error = failure(url)
    assert (error.kind, "ended before the answer did" in str(error)) == ("INCOMPLETE", True)


def test_another_kind_of_model_is_told(serve: Serve) -> None:
    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        yield {"OUTPUT0": [1, 2]}

    with serve(FakeTriton(script)) as url:
        error = failure(url)
    assert "no text_output, token_ids; expected a model of `vlmport tr" in str(error)


def test_a_model_that_is_not_ready_is_told_with_the_reason(serve: Serve) -> None:
    triton = FakeTriton(models={"vlm": "out of memory", "other": "READY"})
    with serve(triton) as url:
        assert "'vlm' is not ready (out of memory); wait" in str(failure(url))
        unknown = failure(url, model="vln")
    assert "found no model 'vln'; available: other, vlm" in str(unknown)
    assert unknown.kind == "NOT_FOUND"
    assert triton.asked == []


@pytest.mark.parametrize("scheme", ["", "grpc://", "http://"])
def test_a_server_that_is_not_there_is_told_at_once(scheme: str) -> None:
    with socket.socket() as reserved:  # bound, but it does not listen
        reserved.bind(("127.0.0.1", 0))
        started = time.perf_counter()
        error = failure(f"{scheme}127.0.0.1:{reserved.getsockname()[1]}")
    assert error.kind == "UNAVAILABLE"
    assert "127.0.0.1" in str(error)
    assert time.perf_counter() - started < SECONDS


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_says_nothing_does_not_hang_the_client(scheme: str) -> None:
    async def look(url: str) -> None:
        async with connected(url, connect_seconds=0.2) as connection:
            await check_model(connection, url, "vlm")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.perf_counter()
        with pytest.raises(ServerError):
            asyncio.run(look(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"))
    assert time.perf_counter() - started < SECONDS


def test_an_answer_that_takes_too_long_is_given_up(serve: Serve) -> None:
    triton = FakeTriton(answer_slowly)
    with serve(triton) as url:
        error = failure(url, timeout_s=0.3)
        assert triton.cancelled.wait(SECONDS)
    assert error.kind == "TIMEOUT"
    assert "no complete answer within 0.3 s; allow more with --timeout" in str(error)


def test_a_client_that_stops_listening_cancels_on_the_server(serve: Serve) -> None:
    def stop(_: object) -> NoReturn:
        raise KeyboardInterrupt

    triton = FakeTriton(answer_slowly)
    with serve(triton) as url:
        with pytest.raises(KeyboardInterrupt):
            ask(url, HELLO, on_part=stop)
        assert triton.cancelled.wait(SECONDS)


def test_a_whole_answer_is_not_cancelled(serve: Serve) -> None:
    triton = FakeTriton()
    with serve(triton) as url:
        ask(url, HELLO)
    assert not triton.cancelled.is_set()


def test_a_server_that_goes_down_ends_the_answer() -> None:
    triton, url_known = FakeTriton(answer_slowly), threading.Event()
    urls: list[str] = []
    stop = threading.Event()

    def run() -> None:
        with triton.grpc() as url:
            urls.append(url)
            url_known.set()
            stop.wait(SECONDS)

    server = threading.Thread(target=run)
    server.start()
    url_known.wait(SECONDS)
    error = failure(urls[0], on_part=lambda _: stop.set())
    server.join()
    assert error.kind in ("UNAVAILABLE", "CANCELLED")


@pytest.mark.parametrize("url", ["localhost", "ftp://a:1", "http://a:1/v2", "grpc://:1", ""])
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"expected host:port, grpc://host:port, http://host"):
        ask(url, HELLO)


def test_grpc_over_tls_is_told_to_take_https() -> None:
    with pytest.raises(InputError, match=r"gRPC over TLS is not offered; take .* https://"):
        ask("grpcs://a:1", HELLO)


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_that_is_none_is_refused(timeout_s: float) -> None:
    with pytest.raises(InputError, match=r"timeout: found \S+ s; expected a number of seconds"):
        wire_request(HELLO, timeout_s=timeout_s)


def test_a_picture_that_cannot_be_read_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.png cannot be read \(No such file"):
        wire_request(Request(prompt="", images=(tmp_path / "absent.png",)))


def refuse(message: str) -> Callable[..., Iterator[dict[str, Any]]]:
    def script(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
        raise RefusalError(message)
        yield {}

    return script


def answer_slowly(asked: Asked, gone: threading.Event) -> Iterator[dict[str, Any]]:
    """A token each 20 ms until the client has gone."""
    for _ in range(round(SECONDS / 0.02)):
        if gone.wait(0.02):
            return
        yield next(answer_in_words(asked, gone))
