from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.trained import exported
from support.triton_repositories import endless_bundle, python_repository
from support.triton_streams import GrpcCall, HttpStream, Stream
from triton_server import TritonServer, triton_server

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
LONG = 1000
ENDLESSLY = 8000


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
def answer(bundle: Path) -> tuple[int, ...]:
    """The first tokens of every answer to the prompt."""
    model = VisionLanguageModel.load(bundle, threads=1, verify=False)
    return model.generate_batch([request_of(LONG)])[0].token_ids


def request_of(max_tokens: int) -> Request:
    return Request(PROMPT, max_new_tokens=max_tokens)


def wait_until_idle(server: TritonServer, model: str = TIGHT) -> None:
    server.wait_for_metric("vlmport_waiting_requests", model, 0)
    server.wait_for_metric("vlmport_active_requests", model, 0)


def is_alive(server: TritonServer) -> bool:
    """Whether the liveness probe of docs/deploy/kubernetes is content with `tight`."""
    page = Path(__file__).resolve().parents[2] / "docs/deploy/kubernetes/deployment.yaml"
    deployment = yaml.safe_load(page.read_text(encoding="utf-8"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    *shell, command = container["livenessProbe"]["exec"]["command"]
    for there, here in (("localhost:8000", server.http), ("models/vlm/", f"models/{TIGHT}/")):
        assert there in command
        command = command.replace(there, here)
    return subprocess.run([*shell, command], check=False).returncode == 0


def assert_whole(stream: Stream, answer: tuple[int, ...], max_tokens: int) -> None:
    stream.ended()
    assert (stream.error, stream.finish_reason) == ("", "length")
    assert tuple(stream.token_ids) == answer[:max_tokens]


def assert_goes_on(stream: Stream, answer: tuple[int, ...]) -> None:
    """The stream is right so far and still gives tokens; then it is left."""
    count = len(stream.token_ids)
    stream.leave()
    assert stream.ended().error == "left"
    assert len(stream.token_ids) > count
    # Greedy answers of different length begin alike.
    assert all(one == two for one, two in zip(stream.token_ids, answer, strict=False))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_that_hangs_up_frees_its_slot_at_once(
    faulty: TritonServer, answer: tuple[int, ...], protocol: str
) -> None:
    cancelled = faulty.metric("vlmport_cancelled_requests", TIGHT)
    other = Stream(faulty, TIGHT, request_of(ENDLESSLY)).begun()
    if protocol == "grpc":
        stream = Stream(faulty, TIGHT, request_of(ENDLESSLY)).begun()
        faulty.wait_for_metric("vlmport_active_requests", TIGHT, 2)
        stream.leave()
    else:
        connection = HttpStream(faulty, TIGHT, ENDLESS).begun()
        faulty.wait_for_metric("vlmport_active_requests", TIGHT, 2)
        connection.hang_up()
    faulty.wait_for_metric("vlmport_cancelled_requests", TIGHT, cancelled + 1, AT_ONCE)
    # The slot takes the next request while the other stream goes on.
    assert faulty.generate(TIGHT, SHORT)[0] == 200
    assert_goes_on(other, answer)


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(faulty: TritonServer) -> None:
    wait_until_idle(faulty)
    running = [GrpcCall(faulty, TIGHT, PROMPT, ENDLESSLY) for _ in range(2)]
    faulty.wait_for_metric("vlmport_active_requests", TIGHT, 2)
    waiting = GrpcCall(faulty, TIGHT, PROMPT, ENDLESSLY)
    faulty.wait_for_metric("vlmport_waiting_requests", TIGHT, 1)
    waiting.hang_up()
    faulty.wait_for_metric("vlmport_waiting_requests", TIGHT, 0, AT_ONCE)
    assert faulty.metric("vlmport_active_requests", TIGHT) == 2
    for one in running:
        one.hang_up()
    faulty.wait_for_metric("vlmport_active_requests", TIGHT, 0, AT_ONCE)


def test_an_http_client_that_hangs_up_while_it_waits_has_a_slot_for_a_moment_only(
    faulty: TritonServer,
) -> None:
    # Triton looks after an HTTP connection only when it writes to it.
    wait_until_idle(faulty)
    running = [GrpcCall(faulty, TIGHT, PROMPT, ENDLESSLY) for _ in range(2)]
    faulty.wait_for_metric("vlmport_active_requests", TIGHT, 2)
    waiting = HttpStream(faulty, TIGHT, ENDLESS)
    faulty.wait_for_metric("vlmport_waiting_requests", TIGHT, 1)
    waiting.hang_up()
    cancelled = faulty.metric("vlmport_cancelled_requests", TIGHT)
    for one in running:
        one.hang_up()
    faulty.wait_for_metric("vlmport_cancelled_requests", TIGHT, cancelled + 3, AT_ONCE)
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
    status, told = faulty.generate(TIGHT, {k: v for k, v in given.items() if v is not None})
    assert status == 400
    assert words in told["error"]


def test_a_full_queue_refuses_the_next_request_and_keeps_the_others(
    faulty: TritonServer, answer: tuple[int, ...]
) -> None:
    wait_until_idle(faulty)
    running = [Stream(faulty, TIGHT, request_of(ENDLESSLY)).begun() for _ in range(2)]
    waiting = [Stream(faulty, TIGHT, request_of(20 + number)) for number in range(2)]
    faulty.wait_for_metric("vlmport_waiting_requests", TIGHT, 2)
    refused = faulty.metric("vlmport_refused_requests", TIGHT)
    status, told = faulty.generate(TIGHT, SHORT)
    # The endpoint gives every error of a model this status (Triton 2.51).
    assert status == 400
    assert "queue: found 4 requests" in told["error"]
    assert "queue: found 4 requests" in Stream(faulty, TIGHT, request_of(4)).ended().error
    assert is_alive(faulty)
    faulty.wait_for_metric("vlmport_refused_requests", TIGHT, refused + 2)
    for stream in running:
        assert_goes_on(stream, answer)
    for number, stream in enumerate(waiting):
        assert_whole(stream, answer, 20 + number)


def test_a_request_whose_time_is_up_ends_and_frees_its_slot(faulty: TritonServer) -> None:
    wait_until_idle(faulty)
    late = faulty.metric("vlmport_late_requests", TIGHT)
    started = time.monotonic()
    status, told = faulty.generate(TIGHT, {**ENDLESS, "timeout": 300_000})
    assert status == 400
    assert "time" in told["error"]
    assert time.monotonic() - started < AT_ONCE
    faulty.wait_for_metric("vlmport_late_requests", TIGHT, late + 1, AT_ONCE)
    # Triton's own field of gRPC; the client itself waits on.
    call = GrpcCall(faulty, TIGHT, PROMPT, ENDLESSLY, timeout_us=300_000)
    faulty.wait_for_metric("vlmport_late_requests", TIGHT, late + 2, AT_ONCE)
    wait_until_idle(faulty)
    call.hang_up()


def test_unloading_and_loading_under_load_leaves_running_streams_whole(
    faulty: TritonServer, answer: tuple[int, ...]
) -> None:
    wait_until_idle(faulty)
    own = Stream(faulty, TIGHT, request_of(LONG)).begun()
    neighbour = Stream(faulty, STEADY, request_of(LONG)).begun()
    faulty.unload(TIGHT)
    status, told = faulty.generate(TIGHT, SHORT)
    assert (status, "no available versions" in told["error"]) == (404, True), told
    assert own.is_running
    faulty.load(TIGHT)
    assert faulty.generate(TIGHT, SHORT)[0] == 200
    assert_whole(own, answer, LONG)
    assert_whole(neighbour, answer, LONG)


def test_a_model_whose_process_died_comes_back_and_the_others_stay(
    faulty: TritonServer, answer: tuple[int, ...]
) -> None:
    neighbour = Stream(faulty, STEADY, request_of(LONG)).begun()
    os.kill(faulty.stubs()[TIGHT], signal.SIGKILL)
    status, told = faulty.generate(TIGHT, SHORT)
    assert (status, "is not healthy" in told["error"]) == (400, True), told
    assert faulty.is_live
    assert faulty.is_ready(TIGHT)
    assert not is_alive(faulty)
    # Loading alone does nothing, since Triton believes that the model is there.
    faulty.unload(TIGHT)
    faulty.load(TIGHT)
    assert faulty.generate(TIGHT, SHORT)[0] == 200
    assert is_alive(faulty)
    assert_whole(neighbour, answer, LONG)


def test_a_server_that_is_told_to_end_lets_running_streams_end(
    bundle: Path, answer: tuple[int, ...], tmp_path: Path
) -> None:
    name = "ending"
    repository = python_repository(bundle, tmp_path / name, name, SMALL, slots=2)
    with triton_server([repository], tmp_path / "server.log", [name]) as server:
        streams = [Stream(server, name, request_of(LONG)).begun() for _ in range(2)]
        server.process.terminate()
        for stream in streams:
            assert_whole(stream, answer, LONG)
        assert server.process.wait(60) == 0
