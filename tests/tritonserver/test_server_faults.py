from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.trained import exported
from support.triton_repositories import endless_bundle, python_repository
from support.triton_server import TritonServer, triton_server
from support.triton_streams import HttpStream, Stream

from vlmport.runtime import Request, VisionLanguageModel

# `tight` has two slots and two places in its queue; `steady` is its neighbour.
TIGHT, STEADY = "tight", "steady"
SMALL = {"threads": 1, "cache_tokens": 2 * 8192, "prefix_bytes": 0, "max_queue": 2}
PROMPT = "Name the blue shape."
ENDLESS = {"text_input": PROMPT, "max_tokens": 8000}
SHORT = {"text_input": PROMPT, "max_tokens": 4}
# What a client that hangs up may hold a slot: one turn of asking (20 ms), one step, and the
# metrics' next turn (250 ms); the rest is for a busy machine.
AT_ONCE = 2.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(exported("fuyu"), tmp_path_factory.mktemp("endless") / "bundle")


@pytest.fixture(scope="module")
def faulty(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("faulty")
    names = (TIGHT, STEADY)
    repositories = [
        python_repository(bundle, folder / name, name, SMALL, slots=2) for name in names
    ]
    with triton_server(repositories, folder / "server.log", names) as running:
        yield running


@pytest.fixture(scope="module")
def model(bundle: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(bundle, threads=1, verify=False)


def request_of(max_tokens: int) -> Request:
    return Request(PROMPT, max_new_tokens=max_tokens)


def wait_until_idle(server: TritonServer, model: str = TIGHT) -> None:
    server.wait_for_metric("vlmport_waiting_requests", model, 0)
    server.wait_for_metric("vlmport_active_requests", model, 0)


def assert_whole(stream: Stream, model: VisionLanguageModel, max_tokens: int) -> None:
    stream.ended()
    assert stream.error == ""
    assert stream.finish_reason == "length"
    assert tuple(stream.token_ids) == model.generate_batch([request_of(max_tokens)])[0].token_ids


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_that_hangs_up_frees_its_slot_at_once(
    faulty: TritonServer, model: VisionLanguageModel, protocol: str
) -> None:
    cancelled = faulty.metric("vlmport_cancelled_requests", TIGHT)
    other = Stream(faulty, TIGHT, request_of(900)).begun()
    if protocol == "grpc":
        stream = Stream(faulty, TIGHT, request_of(8000)).begun()
        faulty.wait_for_metric("vlmport_active_requests", TIGHT, 2)
        stream.leave()
    else:
        connection = HttpStream(faulty, TIGHT, ENDLESS).begun()
        faulty.wait_for_metric("vlmport_active_requests", TIGHT, 2)
        connection.hang_up()
    faulty.wait_for_metric("vlmport_cancelled_requests", TIGHT, cancelled + 1, AT_ONCE)
    # The slot takes the next request while the other stream goes on.
    assert faulty.generate(TIGHT, SHORT)[0] == 200
    assert_whole(other, model, 900)


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(faulty: TritonServer) -> None:
    wait_until_idle(faulty)
    running = [HttpStream(faulty, TIGHT, ENDLESS).begun() for _ in range(2)]
    waiting = HttpStream(faulty, TIGHT, ENDLESS)
    faulty.wait_for_metric("vlmport_waiting_requests", TIGHT, 1)
    waiting.hang_up()
    faulty.wait_for_metric("vlmport_waiting_requests", TIGHT, 0, AT_ONCE)
    assert faulty.metric("vlmport_active_requests", TIGHT) == 2
    for one in running:
        one.hang_up()
    wait_until_idle(faulty)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"image": "AAAA"}, "not a picture that Pillow can read"),
        ({"image": "no base64!"}, "not a picture that Pillow can read"),
        ({"image": "AAA"}, "image 1: not base64"),
        ({"image": ""}, "image 1: found nothing"),
        ({"image": "https://localhost/x.png"}, "image 1: found an address; a server opens none"),
        ({"image": "data:image/png,AAAA"}, "image 1: found a data URL without base64"),
        ({"max_token": 5}, "parameter max_token: unknown; did you mean max_tokens?"),
        ({"max_tokens": 0}, "parameter max_tokens: found 0; expected 1 or more"),
        ({"max_tokens": "many"}, "parameter max_tokens: found 'many'; expected a whole number"),
        ({"temperature": True}, "parameter temperature: found True; expected a number"),
        ({"top_p": 2.0}, "top_p: found 2.0; expected a number above 0 and at most 1"),
        ({"timeout": -1}, "parameter timeout: found -1; expected microseconds"),
        ({"stop": [""]}, "stop_strings: found an empty text"),
        ({"messages": "[]"}, "inputs: found both of text_input and messages"),
        ({"text_input": None}, "inputs: found neither of text_input and messages"),
        ({"text_input": None, "messages": "{"}, "messages: not valid JSON"),
        (
            {
                "text_input": None,
                "messages": '[{"role": "user", "content": [{"type": "image", "path": "/x"}]}]',
            },
            'messages: found an image part with "path"; a server opens no files',
        ),
        ({"text_input": "shape " * 20000}, "leaves no room for an answer"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_our_words(
    faulty: TritonServer, content: dict[str, Any], words: str
) -> None:
    given = {**SHORT, **content}
    status, answer = faulty.generate(TIGHT, {k: v for k, v in given.items() if v is not None})
    assert status == 400
    assert words in answer["error"]


def test_a_full_queue_refuses_the_next_request_and_keeps_the_others(
    faulty: TritonServer, model: VisionLanguageModel
) -> None:
    wait_until_idle(faulty)
    streams = [Stream(faulty, TIGHT, request_of(700 + number)) for number in range(2)]
    faulty.wait_for_metric("vlmport_active_requests", TIGHT, 2)
    streams += [Stream(faulty, TIGHT, request_of(20 + number)) for number in range(2)]
    faulty.wait_for_metric("vlmport_waiting_requests", TIGHT, 2)
    status, answer = faulty.generate(TIGHT, SHORT)
    assert status == 503
    assert "queue: found 4 requests" in answer["error"]
    for stream, max_tokens in zip(streams, (700, 701, 20, 21), strict=True):
        assert_whole(stream, model, max_tokens)


def test_a_request_whose_time_is_up_ends_and_frees_its_slot(faulty: TritonServer) -> None:
    wait_until_idle(faulty)
    late = faulty.metric("vlmport_late_requests", TIGHT)
    started = time.monotonic()
    status, answer = faulty.generate(TIGHT, {**ENDLESS, "timeout": 300_000})
    assert status == 503
    assert "request: " in answer["error"]
    assert time.monotonic() - started < AT_ONCE
    wait_until_idle(faulty)
    # Triton's own field of gRPC.
    stream = Stream(faulty, TIGHT, request_of(8000), timeout_s=0.5).ended()
    assert stream.error
    wait_until_idle(faulty)
    assert faulty.metric("vlmport_late_requests", TIGHT) + faulty.metric(
        "vlmport_cancelled_requests", TIGHT
    ) >= late + 2


def test_unloading_and_loading_under_load_leaves_running_streams_whole(
    faulty: TritonServer, model: VisionLanguageModel
) -> None:
    wait_until_idle(faulty)
    own = Stream(faulty, TIGHT, request_of(1500)).begun()
    neighbour = Stream(faulty, STEADY, request_of(1500)).begun()
    faulty.unload(TIGHT)
    status, answer = faulty.generate(TIGHT, SHORT)
    assert (status, "no available versions" in answer["error"]) == (400, True)
    assert own.is_running
    faulty.load(TIGHT)
    assert faulty.generate(TIGHT, SHORT)[0] == 200
    assert_whole(own, model, 1500)
    assert_whole(neighbour, model, 1500)


def test_a_model_whose_process_died_comes_back_and_the_others_stay(
    faulty: TritonServer, model: VisionLanguageModel
) -> None:
    neighbour = Stream(faulty, STEADY, request_of(1500)).begun()
    os.kill(faulty.stubs()[TIGHT], signal.SIGKILL)
    status, answer = faulty.generate(TIGHT, SHORT)
    assert (status, "is not healthy" in answer["error"]) == (500, True)
    assert faulty.is_live
    # Loading alone does nothing, since Triton believes that the model is there.
    faulty.unload(TIGHT)
    faulty.load(TIGHT)
    assert faulty.generate(TIGHT, SHORT)[0] == 200
    assert_whole(neighbour, model, 1500)


def test_a_server_that_ends_with_streams_running_ends_them(
    bundle: Path, tmp_path: Path
) -> None:
    name = "ending"
    repository = python_repository(bundle, tmp_path / name, name, SMALL, slots=2)
    with triton_server([repository], tmp_path / "server.log", [name]) as server:
        streams = [Stream(server, name, request_of(8000)).begun() for _ in range(2)]
        server.process.terminate()
        status = server.process.wait(40)
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert "Signal (11)" not in log
    assert status in (0, 1)
    for stream in streams:
        assert stream.ended(10).error or stream.finish_reason == "length"
