from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fake_python_backend import (
    FakeBackend,
    FakeError,
    FakeRequest,
    FakeResponse,
    FakeSender,
    FakeTensor,
)
from support.trained import exported

from vlmport.contract_engines import ENGINES_NAME
from vlmport.errors import EngineError, VlmportError
from vlmport.manifest import load_manifest
from vlmport.runtime import Request, VisionLanguageModel
from vlmport.runtime.triton_model.answer import TritonPythonModel, _open
from vlmport.runtime.triton_model.answering import Answering
from vlmport.runtime.triton_model.call import Call
from vlmport.runtime.triton_model.image_models import ImageModels
from vlmport.runtime.triton_model.responses import Responses
from vlmport.runtime.triton_model.settings import ModelSettings, read_settings


class GpuTensor(FakeTensor):
    """A tensor on a GPU, which Triton's `as_numpy` refuses."""

    def as_numpy(self) -> NDArray[Any]:
        raise RuntimeError("Tensor is stored in GPU and cannot be converted to NumPy.")


class ImageModelOnGpu(FakeBackend):
    """Hands out tensors of the host to those alone who ask for them."""

    TritonModelException = RuntimeError
    TRITONSERVER_MEMORY_CPU = 0
    PreferredMemory = staticmethod(lambda kind: kind)

    class InferenceRequest:
        def __init__(self, *, preferred_memory: int | None = None, **request: Any) -> None:
            self._names = request["requested_output_names"]
            self._tensor = FakeTensor if preferred_memory == 0 else GpuTensor

        def exec(self) -> FakeResponse:
            array = np.ones((1, 2, 128), np.float32)
            return FakeResponse([self._tensor(name, array) for name in self._names])


def test_features_come_from_image_models_on_a_gpu() -> None:
    manifest = load_manifest(exported("tinyllava"))
    models = {graph: graph for graph in manifest.image_graphs}
    features = ImageModels(ImageModelOnGpu, manifest, models)
    tile = {"pixel_values": np.zeros((1, 3, 64, 64), np.float32)}
    assert features([tile]).shape == (2, 128)


def model_with(answering: Any) -> TritonPythonModel:
    model = TritonPythonModel()
    model._backend, model._answering = FakeBackend, answering
    return model


def test_an_empty_request_is_told_that_nothing_is_answered_any_more() -> None:
    def check_is_open() -> None:
        raise VlmportError("service: its worker failed")

    request = FakeRequest()
    model_with(SimpleNamespace(check_is_open=check_is_open)).execute([request])
    error = request.sender.sent[0].error()
    assert (error.message(), error.code()) == ("service: its worker failed", FakeError.INTERNAL)


def test_a_request_that_cannot_be_read_ends_alone() -> None:
    model = model_with(SimpleNamespace(check_is_open=lambda: None))
    broken = FakeRequest({"text_input": "What?"}, parameters="no JSON")
    empty = FakeRequest()
    model.execute([broken, empty])
    codes = [request.sender.sent[0].error().code() for request in (broken, empty)]
    assert codes == [FakeError.INTERNAL, FakeError.INVALID_ARG]
    assert "request: JSONDecodeError: " in broken.sender.sent[0].error().message()


class ForgetfulSender(FakeSender):
    """Fails at the first question, then says that the client has gone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.ended = threading.Event()

    def is_cancelled(self) -> bool:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("no shared memory")
        return True

    def send(self, response: object = None, *, flags: int = 0) -> None:
        super().send(response, flags=flags)
        self.ended.set()


def test_a_question_that_triton_does_not_answer_is_asked_again() -> None:
    async def submit_async(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    service: Any = SimpleNamespace(
        submit_async=submit_async, statistics=lambda: None, close=lambda: None
    )
    metrics: Any = SimpleNamespace(update=lambda _: None, close=lambda: None)
    answering = Answering(service, metrics, 1, has_regions=False)
    sender = ForgetfulSender()
    answering.begin(Call(Request("?"), False, 0, None), Responses(FakeBackend, sender))
    assert sender.ended.wait(10)
    answering.close()
    assert sender.asked == 2
    assert sender.sent[0].error().code() == FakeError.CANCELLED


def settings_with_engines(repository: Path) -> ModelSettings:
    parameters = {"runtime_backend": "tensorrt", "engines": "engines"}
    config = {"parameters": {key: {"string_value": text} for key, text in parameters.items()}}
    return read_settings(
        {
            "model_config": json.dumps(config),
            "model_repository": str(repository),
            "model_name": "vlm",
            "model_version": "1",
        }
    )


def test_missing_and_foreign_engines_are_told_with_the_step_that_builds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_with_engines(tmp_path)
    with pytest.raises(EngineError, match=r"1/engines: found no engines; .*build_engines\.sh"):
        _open(FakeBackend, settings)

    def load(*_: object, **__: object) -> None:
        raise EngineError("engines: found engines for tensorrt 9.9.9; build them again")

    folder = tmp_path / "1" / "engines"
    folder.mkdir(parents=True)
    (folder / ENGINES_NAME).touch()
    monkeypatch.setattr(VisionLanguageModel, "load", load)
    with pytest.raises(EngineError, match=r"9\.9\.9; build them again; .*build_engines\.sh does"):
        _open(FakeBackend, settings)
