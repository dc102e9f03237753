from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.fake_python_backend import FakeBackend, FakeError, FakeRequest, FakeSender, FakeTensor

from vlmport.errors import (
    CancelledError,
    DeadlineError,
    InputError,
    QueueFullError,
    VlmportError,
)
from vlmport.runtime import GenerationResult, SamplingOptions
from vlmport.runtime.triton_model.call import read_call
from vlmport.runtime.triton_model.parameters import read_parameters
from vlmport.runtime.triton_model.pictures import encoded_picture
from vlmport.runtime.triton_model.python_backend import check_arrays, python_backend
from vlmport.runtime.triton_model.responses import Responses, error_response


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (200, 30, 60)).save(stream, kind)
    return stream.getvalue()


def test_numbers_come_as_numbers_or_as_texts_of_them() -> None:
    values = {"max_tokens": "7", "temperature": "0.5", "top_k": 3.0, "seed": "5", "priority": -2}
    read = read_parameters(json.dumps({**values, "id": "r1"}), timeout=0)
    assert read.max_tokens == 7
    assert read.sampling == SamplingOptions(temperature=0.5, top_k=3, seed=5)
    assert (read.priority, read.timeout_s) == (-2, None)


def test_a_seed_keeps_all_its_digits() -> None:
    seed = 2**60 + 1
    for value in (seed, str(seed)):
        assert read_parameters(json.dumps({"seed": value}), timeout=0).sampling.seed == seed


def test_a_timeout_comes_by_tritons_field_or_among_the_parameters() -> None:
    assert read_parameters("", timeout=2_500_000).timeout_s == 2.5
    assert read_parameters('{"timeout": "1000"}', timeout=0).timeout_s == 0.001
    assert read_parameters('{"timeout": 0}', timeout=0).timeout_s is None


def test_all_faults_of_the_parameters_are_told_at_once() -> None:
    text = '{"temprature": 1, "top_k": 1.5, "seed": true, "min_p": "x", "stop": "y"}'
    with pytest.raises(InputError) as caught:
        read_parameters(text, timeout=0)
    told = str(caught.value)
    for words in (
        "parameter temprature: unknown; did you mean temperature?",
        "parameter stop: unknown; ",
        "parameter top_k: found 1.5; expected a whole number",
        "parameter seed: found True; expected a whole number",
        "parameter min_p: found 'x'; expected a number",
    ):
        assert words in told


@pytest.mark.parametrize("value", ["Infinity", "1e999", "NaN"])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(InputError, match="expected"):
        read_parameters(f'{{"max_tokens": {value}}}', timeout=0)
    with pytest.raises(InputError, match="expected"):
        read_parameters(f'{{"temperature": {value}}}', timeout=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_picture_s_bytes_pass_as_they_are_and_as_text(kind: str) -> None:
    raw = picture(kind)
    text = base64.b64encode(raw)
    lines = base64.encodebytes(raw)
    for value in (raw, text, lines, b"data:image/x;base64," + text, b"data:;base64," + lines):
        assert encoded_picture(value, "image 1") == raw


def test_a_picture_of_plain_text_is_no_base64() -> None:
    plain = b"P3 1 1 255 200 30 60 "
    assert encoded_picture(plain, "image 1") == plain


def test_inputs_become_a_request() -> None:
    raw = picture("PNG")
    incoming = FakeRequest(
        {
            "text_input": "What?",
            "image": [raw, base64.b64encode(raw)],
            "stop": ["a", "b"],
            "stream": True,
        },
        '{"max_tokens": 3}',
    )
    call = read_call(incoming)
    assert call.is_streaming
    assert call.request.prompt == "What?"
    assert call.request.images == (raw, raw)
    assert call.request.stop_strings == ("a", "b")
    assert call.request.max_new_tokens == 3


def test_a_text_is_never_taken_for_a_file_of_the_server(tmp_path: Any) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(picture("PNG"))
    call = read_call(FakeRequest({"text_input": "What?", "image": str(path)}))
    assert call.request.images == (str(path).encode(),)
    chat = [{"role": "user", "content": [{"type": "image", "path": str(path)}]}]
    with pytest.raises(InputError, match="a server opens no files"):
        read_call(FakeRequest({"messages": json.dumps(chat)}))


def test_text_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(InputError, match="text_input: not UTF-8"):
        read_call(FakeRequest({"text_input": b"\xff\xfe"}))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a"), FakeError.INVALID_ARG),
        (QueueFullError("a"), FakeError.UNAVAILABLE),
        (DeadlineError("a"), FakeError.UNAVAILABLE),
        (CancelledError("a"), FakeError.CANCELLED),
        (VlmportError("a"), FakeError.INTERNAL),
    ],
)
def test_errors_get_tritons_codes(error: VlmportError, code: int) -> None:
    response: Any = error_response(FakeBackend, error)
    assert (response.error().message(), response.error().code()) == ("a", code)


def test_nobody_asks_for_a_client_after_the_last_response() -> None:
    sender = FakeSender()
    responses = Responses(FakeBackend, sender)
    assert not responses.is_cancelled
    responses.piece("a", [1])
    result = GenerationResult("ab", (1, 2), 5, 2, "stop", 1.0, 1.0, "onnxruntime")
    responses.last("b", [2], result, has_regions=False)
    assert sender.has_ended
    assert not responses.is_cancelled  # the fake fails, as the server crashes
    first, last = (response.arrays() for response in sender.sent)
    assert (first["text_output"][0], first["token_ids"].tolist()) == (b"a", [1])
    assert first.keys() == {"text_output", "token_ids"}
    assert (last["token_ids"].tolist(), last["finish_reason"][0]) == ([2], b"stop")
    assert [last[name][0] for name in ("prompt_tokens", "image_tokens", "generated_tokens")] == [
        5,
        2,
        2,
    ]


class StubForAnotherNumpy(FakeBackend):
    """Reads wrong strides, as the stub of Triton 2.51 with numpy 2.4."""

    class Tensor(FakeTensor):
        @classmethod
        def from_dlpack(cls, name: str, array: NDArray[Any]) -> FakeTensor:
            return FakeTensor(name, np.full_like(array, array[0]))


def test_a_stub_that_garbles_arrays_is_refused() -> None:
    check_arrays(FakeBackend)
    with pytest.raises(VlmportError, match="install numpy below 2"):
        check_arrays(StubForAnotherNumpy)


def test_outside_of_a_server_there_is_no_python_backend() -> None:
    with pytest.raises(VlmportError, match="load the repository with tritonserver"):
        python_backend()
