from __future__ import annotations

import base64
import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from support.triton_cases import Expected, Family
from triton_server import TritonServer

from vlmport.api.client import ask
from vlmport.api.client_wire import AnswerPart, wire_request
from vlmport.errors import ServerError
from vlmport.runtime import Request

CLIENTS = 16
WAYS = ("grpc", "generate_stream", "generate")


def through(way: str, server: TritonServer, model: str, request: Request) -> Expected:
    """Sends a request one of the three ways."""
    if way == "generate":
        return plain_json(server, model, request)
    url = server.grpc if way == "grpc" else f"http://{server.http}"
    try:
        answer = ask(url, request, model=model)
    except ServerError as error:
        return Expected(error=str(error))
    return Expected(answer.token_ids, answer.text, answer.finish_reason)


def plain_json(server: TritonServer, model: str, request: Request) -> Expected:
    """As `curl` would send it: nothing of vlmport's client but the names of the fields."""
    wire = wire_request(request)
    content: dict[str, object] = {
        "image": [base64.b64encode(picture).decode() for picture in wire.images],
        "stop": list(wire.stop),
        **wire.parameters,
    }
    content |= {"messages": wire.messages} if wire.messages else {"text_input": wire.text_input}
    status, answer = server.generate(
        model, {key: value for key, value in content.items() if value != []}
    )
    if status != 200:
        return Expected(error=answer["error"])
    token_ids = answer["token_ids"]
    token_ids = token_ids if isinstance(token_ids, list) else [token_ids]
    return Expected(tuple(token_ids), answer["text_output"], answer["finish_reason"])


def assert_same(found: Expected, expected: Expected) -> None:
    if expected.error:
        # A client puts its own words round the server's message.
        assert expected.error in found.error
    else:
        assert found == expected


@pytest.mark.parametrize("way", WAYS)
def test_each_request_alone_gets_the_tokens_of_generate(
    server: TritonServer, family: Family, way: str
) -> None:
    for request, expected in zip(family.requests, family.expected, strict=True):
        assert_same(through(way, server, family.name, request), expected)


@pytest.mark.parametrize("twin", ["", "_bls"])
def test_sixteen_clients_of_mixed_options_get_the_tokens_of_generate(
    server: TritonServer, family: Family, twin: str
) -> None:
    count = len(family.requests)

    def client(number: int) -> list[tuple[Expected, Expected]]:
        # Each in an order of its own, so that every neighbour occurs.
        order = [(number * 5 + step) % count for step in range(3)]
        way = WAYS[number % len(WAYS)]
        return [
            (through(way, server, family.name + twin, family.requests[one]), family.expected[one])
            for one in order
        ]

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pair for pairs in pool.map(client, range(CLIENTS)) for pair in pairs]
    assert len(answers) == 3 * CLIENTS
    for found, expected in answers:
        assert_same(found, expected)


def test_the_features_ensemble_gives_the_model_s_features(
    server: TritonServer, family: Family
) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.grpc)
    for request in family.requests[:2]:
        path = request.images[0]
        assert isinstance(path, Path)
        tensor = tritonclient.grpc.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([path.read_bytes()], np.object_))
        answer: Any = client.infer(f"{family.name}_features", [tensor])
        expected = family.model.image_features(family.model.prepare(path))
        found = answer.as_numpy("image_features")
        assert found is not None
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_the_embedding_is_a_model_of_its_own(server: TritonServer, family: Family) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.grpc)
    input_ids = np.array([[3, 1, 4], [1, 5, 9]], np.int64)
    tensor = tritonclient.grpc.InferInput("input_ids", [2, 3], "INT64")
    tensor.set_data_from_numpy(input_ids)
    answer: Any = client.infer(f"{family.name}_embed_tokens", [tensor])
    np.testing.assert_array_equal(
        answer.as_numpy("inputs_embeds"), family.model.inputs_embeds(input_ids)
    )


def test_usage_and_regions_come_with_the_answer(server: TritonServer, family: Family) -> None:
    request = family.requests[0]
    result = family.model.generate_batch([request])[0]
    for url in (server.grpc, f"http://{server.http}"):
        answer = ask(url, request, model=family.name)
        assert answer.prompt_tokens == result.prompt_tokens
        assert answer.image_tokens == result.image_tokens
        assert answer.generated_tokens == result.generated_tokens
        assert len(answer.regions) == len(result.regions)


def test_a_stream_comes_piece_by_piece(server: TritonServer, family: Family) -> None:
    request, expected = family.requests[3], family.expected[3]
    parts: list[AnswerPart] = []
    ask(server.grpc, request, model=family.name, on_part=parts.append)
    assert [len(part.token_ids) for part in parts[:-1]] == [1] * len(expected.token_ids)
    assert "".join(part.text for part in parts) == expected.text
    assert [part.finish_reason for part in parts[:-1]] == [""] * (len(parts) - 1)
    assert parts[-1].finish_reason == expected.finish_reason
    counts = [(part.prompt_tokens > 0, part.generated_tokens) for part in parts]
    assert counts == [(False, 0)] * (len(parts) - 1) + [(True, len(expected.token_ids))]


def test_one_picture_as_text_a_data_url_and_a_list(server: TritonServer, family: Family) -> None:
    request, expected = family.requests[0], family.expected[0]
    path = request.images[0]
    assert isinstance(path, Path)
    text = base64.b64encode(path.read_bytes()).decode()
    for image in (text, [text], f"data:image/png;base64,{text}"):
        content = {"text_input": request.prompt, "image": image}
        status, answer = server.generate(family.name, content)
        assert (status, answer["text_output"]) == (200, expected.text), json.dumps(answer)


def test_an_image_model_that_is_not_there_is_the_request_s_error(
    server: TritonServer, family: Family
) -> None:
    # Its features are not in the cache of the model.
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(picture, "PNG")
    request = dataclasses.replace(family.requests[0], images=(picture.getvalue(),))
    server.unload(f"{family.name}_projector")
    try:
        with pytest.raises(ServerError, match=f"model {family.name}_projector: "):
            ask(server.grpc, request, model=f"{family.name}_bls")
    finally:
        server.load(f"{family.name}_projector")
    expected = family.model.generate_batch([request])[0]
    assert ask(server.grpc, request, model=f"{family.name}_bls").token_ids == expected.token_ids
