"""What callbacks, numbers and workers that fail do to the requests."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import numpy as np
import pytest
from support.held_service import QUESTION, submitted, whole
from support.served_models import HeldModel, wait_until

from vlmport.errors import VlmportError
from vlmport.runtime import GenerationService, Piece, ServingOptions
from vlmport.runtime.serving.answer import Answer
from vlmport.runtime.serving.batch import ContinuousBatch


@pytest.mark.parametrize("kind", [ConnectionError, SystemExit])
def test_a_callback_that_raises_ends_its_request_alone(
    model: HeldModel,
    service: GenerationService,
    caplog: pytest.LogCaptureFixture,
    kind: type[BaseException],
) -> None:
    model.slots.let()
    ends: list[Any] = []

    def refuse(piece: Piece) -> None:
        raise kind("hung up")

    caplog.set_level(logging.ERROR)
    answer = service.submit(QUESTION, on_piece=refuse, on_end=lambda *end: ends.append(end))
    other = service.submit(QUESTION)
    message = rf"^on_piece: raised {kind.__name__}: hung up"
    with pytest.raises(VlmportError, match=message) as caught:
        answer.result()
    assert isinstance(caught.value.__cause__, kind)
    assert other.result().token_ids == whole(model)
    assert ends == [(None, caught.value)]
    assert "on_piece raised" in caplog.text
    assert len(list_of(answer)) == 1
    wait_until(lambda: service.statistics().free_slots == 2)
    assert service.statistics().failed == 1


def list_of(answer: Answer) -> list[Piece]:
    pieces: list[Piece] = []
    with pytest.raises(VlmportError):
        pieces.extend(answer)
    return pieces


@pytest.mark.parametrize("kind", [ConnectionError, SystemExit])
def test_an_end_that_raises_is_logged(
    model: HeldModel,
    service: GenerationService,
    caplog: pytest.LogCaptureFixture,
    kind: type[BaseException],
) -> None:
    model.slots.let()

    def refuse(*_: object) -> None:
        raise kind("hung up")

    caplog.set_level(logging.ERROR)
    for _ in range(2):
        assert service.submit(QUESTION, on_end=refuse).result().token_ids == whole(model)
    service.close()
    assert caplog.text.count("on_end raised") == 2


def test_a_result_that_cannot_be_made_ends_its_request_alone(
    model: HeldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = model.result_of

    with GenerationService(model) as service:

        def once(row: Any) -> Any:
            monkeypatch.setattr(service._worker, "_result_of", make)
            raise ValueError("no mask")

        model.slots.let()
        monkeypatch.setattr(service._worker, "_result_of", once)
        answers = [service.submit(QUESTION), service.submit(QUESTION)]
        with pytest.raises(VlmportError, match=r"^result: raised ValueError: no mask"):
            answers[0].result()
        assert answers[1].result().token_ids == whole(model)


def test_numbers_that_overflow_end_the_requests_and_the_service_goes_on(
    model: HeldModel, service: GenerationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.slots.let()
    step = model.slots.step

    def overflowed(token_ids: Any) -> Any:
        monkeypatch.setattr(model.slots, "step", step)
        return np.full_like(step(token_ids), np.nan)

    monkeypatch.setattr(model.slots, "step", overflowed)
    with pytest.raises(VlmportError, match="the model's numbers overflowed"):
        service.submit(QUESTION).result()
    assert service.submit(QUESTION).result().token_ids == whole(model)
    assert service.statistics().failed == 1


def test_a_backend_that_is_broken_closes_the_service(
    model: HeldModel, service: GenerationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the device is gone")

    answers = [service.submit(QUESTION) for _ in range(4)]
    for name in ("step", "release"):
        monkeypatch.setattr(model.slots, name, fail)
    model.slots.let()
    for answer in answers:
        with pytest.raises(VlmportError, match=r"the device is gone|cannot be used any more"):
            answer.result()
    service._worker._thread.join(20)
    assert model.slots.is_closed
    monkeypatch.setattr(model, "prepare_row", fail)
    with pytest.raises(VlmportError, match=r"^service: its backend cannot be used any more"):
        service.submit(QUESTION)
    assert (service.statistics().failed, service.statistics().waiting) == (4, 0)


def test_a_worker_that_fails_tells_everybody(
    model: HeldModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = GenerationService(model, ServingOptions(num_slots=2))
    answers = [service.submit(QUESTION) for _ in range(3)]
    assert model.slots.has_stepped.wait(20)
    reading: list[Any] = []

    def read() -> None:
        try:
            reading.extend(answers[0])
        except VlmportError as error:
            reading.append(error)

    reader = threading.Thread(target=read)
    reader.start()

    def fail(_: ContinuousBatch) -> Any:
        raise RuntimeError("a fault of ours")

    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(ContinuousBatch, "step", fail)
    model.slots.let()
    message = r"^service: its worker failed \(RuntimeError: a fault of ours\)"
    for answer in answers:
        with pytest.raises(VlmportError, match=message) as caught:
            answer.result()
        assert isinstance(caught.value.__cause__, RuntimeError)
    reader.join(20)
    assert isinstance(reading[-1], VlmportError)
    with pytest.raises(VlmportError, match=message):
        service.check_is_open()
    with pytest.raises(VlmportError, match=message):
        service.submit(QUESTION)
    with pytest.raises(VlmportError, match=message):
        asyncio.run(submitted(service, QUESTION))
    service.close()
    assert model.slots.is_closed
    assert service.statistics().failed == 3
    assert "has failed" in caplog.text
