"""How requests end before their answers are complete."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.held_service import QUESTION, submitted, whole
from support.served_models import HeldModel, untimed, wait_until

from vlmport.errors import CancelledError, DeadlineError, QueueFullError
from vlmport.runtime import GenerationService, Request, ServingOptions
from vlmport.runtime.serving.answer import Answer
from vlmport.runtime.serving.batch import ContinuousBatch


def test_cancelled_requests_leave_and_the_others_stay_whole(
    model: HeldModel, service: GenerationService
) -> None:
    other, decoding, queued = (service.submit(QUESTION) for _ in range(3))
    assert next(iter(other)).token_id is not None  # leaves the iteration
    assert model.slots.has_stepped.wait(20)
    queued.cancel()
    model.slots.let()
    for answer in (other, queued):
        with pytest.raises(CancelledError, match=r"^request: taken back before its answer"):
            answer.result()
        with pytest.raises(CancelledError):
            list(answer)
    assert decoding.result().token_ids == whole(model)
    decoding.cancel()  # too late
    assert decoding.result().token_ids == whole(model)
    wait_until(lambda: service.statistics().free_slots == 2)
    told = service.statistics()
    assert (told.finished, told.cancelled, told.waiting, told.active) == (1, 2, 0, 0)


def test_leaving_a_loop_early_cancels(model: HeldModel, service: GenerationService) -> None:
    model.slots.let(3)
    answer = service.submit(QUESTION)
    for number, _ in enumerate(answer):
        if number == 3:
            break
    model.slots.let()
    with pytest.raises(CancelledError):
        answer.result()


def test_leaving_a_loop_of_a_task_early_cancels(
    model: HeldModel, service: GenerationService
) -> None:
    async def leave() -> None:
        answer = await service.submit_async(QUESTION)
        number = 0
        async for _ in answer:
            number += 1
            if number == 4:
                break
        await asyncio.sleep(0.05)  # an event loop closes what was left in its next rounds
        model.slots.let()
        with pytest.raises(CancelledError):
            await answer

    model.slots.let(3)
    asyncio.run(leave())
    assert service.statistics().cancelled == 1


@pytest.mark.parametrize("way", ["await", "async for"])
def test_a_cancelled_task_cancels_its_request(
    model: HeldModel, service: GenerationService, way: str
) -> None:
    async def read(answer: Answer) -> None:
        if way == "await":
            await answer
        async for _ in answer:
            pass

    async def give_up() -> Answer:
        answer = await service.submit_async(QUESTION)
        task = asyncio.create_task(read(answer))
        await asyncio.sleep(0.01)  # a task that has not begun reads nothing
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer

    answer = asyncio.run(give_up())
    model.slots.let()
    with pytest.raises(CancelledError):
        answer.result()


def test_an_event_loop_that_is_gone_holds_nobody_up(
    model: HeldModel, service: GenerationService
) -> None:
    loop = asyncio.new_event_loop()
    answer = loop.run_until_complete(service.submit_async(QUESTION))
    reading = answer.__await__()
    waiting = loop.create_task(_forward(reading))
    loop.run_until_complete(asyncio.sleep(0.01))
    assert not waiting.done()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # it is, on purpose
    loop.close()
    model.slots.let()
    assert service.submit(QUESTION).result().token_ids == whole(model)


async def _forward(reading: Any) -> None:
    class Wrapped:
        def __await__(self) -> Any:
            return reading

    await Wrapped()


def test_time_is_up_while_decoding(model: HeldModel, service: GenerationService) -> None:
    late = service.submit(QUESTION, timeout_s=0.3)
    other = service.submit(QUESTION, timeout_s=600)
    assert model.slots.has_stepped.wait(20)
    time.sleep(0.3)
    model.slots.let()
    with pytest.raises(DeadlineError, match=r"^request: not answered within its time"):
        late.result()
    assert other.result().token_ids == whole(model)
    assert service.statistics().late == 1


def test_time_is_up_in_preparation(model: HeldModel, service: GenerationService) -> None:
    encode = model.encode_image

    def slow(image: Any) -> Any:
        time.sleep(0.1)
        return encode(image)

    model.encode_image = slow  # type: ignore[method-assign]
    with pytest.raises(DeadlineError, match=r"^request: not prepared within its time"):
        service.submit(QUESTION, timeout_s=0.05)
    told = service.statistics()
    assert (told.late, told.waiting, told.feature_misses) == (1, 0, 1)
    model.slots.let()
    assert service.submit(QUESTION, timeout_s=600).result().token_ids == whole(model)


def test_a_full_service_refuses_before_it_prepares(
    model: HeldModel, service: GenerationService
) -> None:
    answers = [service.submit(QUESTION) for _ in range(4)]
    missing = Request(prompt="What?", images=("nothing.png",))
    for _ in range(2):
        with pytest.raises(QueueFullError, match=r"^queue: found 4 requests .* ask again later"):
            service.submit(missing)
    with pytest.raises(QueueFullError):
        asyncio.run(submitted(service, missing))
    assert service.statistics().refused == 3
    model.slots.let()
    assert {answer.result().token_ids for answer in answers} == {whole(model)}
    assert service.submit(QUESTION).result().token_ids == whole(model)


def test_requests_in_preparation_count_as_waiting(
    model: HeldModel, service: GenerationService
) -> None:
    may_encode = threading.Event()
    encode = model.encode_image

    def held(image: Any) -> Any:
        assert may_encode.wait(20)
        return encode(image)

    model.encode_image = held  # type: ignore[method-assign]
    model.slots.let()
    found: list[tuple[int, ...]] = []
    threads = [
        threading.Thread(target=lambda: found.append(service.submit(QUESTION).result().token_ids))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.statistics().waiting == 4)
    with pytest.raises(QueueFullError):
        service.submit(QUESTION)
    may_encode.set()
    for thread in threads:
        thread.join(20)
    assert found == [whole(model)] * 4


def test_a_task_cancelled_in_preparation_takes_its_request_back(
    model: HeldModel, service: GenerationService
) -> None:
    may_encode, is_encoding = threading.Event(), threading.Event()
    encode = model.encode_image

    def held(image: Any) -> Any:
        is_encoding.set()
        assert may_encode.wait(20)
        return encode(image)

    model.encode_image = held  # type: ignore[method-assign]

    async def give_up() -> None:
        task = asyncio.create_task(service.submit_async(QUESTION))
        while not is_encoding.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_encode.set()

    asyncio.run(give_up())
    wait_until(lambda: service.statistics().waiting == 0)
    told = service.statistics()
    assert (told.cancelled, told.generated_tokens) == (1, 0)


def test_a_task_cancelled_before_a_thread_is_free_gives_its_place_back(
    service: GenerationService,
) -> None:
    async def give_up() -> None:
        from concurrent.futures import ThreadPoolExecutor

        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        may_end = threading.Event()
        busy = loop.run_in_executor(None, may_end.wait, 20)
        task = asyncio.create_task(service.submit_async(QUESTION))
        await asyncio.sleep(0.01)
        assert service.statistics().waiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.statistics().waiting == 0
        may_end.set()
        await busy

    asyncio.run(give_up())
    told = service.statistics()
    assert (told.cancelled, told.waiting, told.feature_misses) == (1, 0, 0)


def test_an_event_loop_without_threads_gives_the_place_back(service: GenerationService) -> None:
    async def ask() -> None:
        await asyncio.get_running_loop().shutdown_default_executor()
        with pytest.raises(RuntimeError):
            await service.submit_async(QUESTION)

    asyncio.run(ask())
    assert service.statistics().waiting == 0


def test_closing_ends_every_request(model: HeldModel) -> None:
    service = GenerationService(model, ServingOptions(num_slots=2))
    ends: list[Any] = []
    answers = [service.submit(QUESTION, on_end=lambda *end: ends.append(end)) for _ in range(4)]
    assert model.slots.has_stepped.wait(20)
    closing = [threading.Thread(target=service.close) for _ in range(2)]
    for thread in closing:
        thread.start()
    model.slots.let()
    for thread in closing:
        thread.join(20)
        assert not thread.is_alive()
    assert model.slots.is_closed
    assert not any(thread.name == "vlmport-serving" for thread in threading.enumerate())
    for answer in answers:
        assert answer.is_done
        with pytest.raises(CancelledError, match=r"^service: closed before the answer"):
            answer.result()
    assert [type(error) for _, error in ends] == [CancelledError] * 4
    with pytest.raises(CancelledError, match=r"^service: closed"):
        service.submit(QUESTION)
    service.close()
    told = service.statistics()
    assert (told.cancelled, told.active, told.waiting, told.free_slots) == (4, 0, 0, 2)


def test_a_callback_may_close_the_service(model: HeldModel) -> None:
    service = GenerationService(model)
    model.slots.let()
    answer = service.submit(QUESTION, on_piece=lambda _: service.close())
    with pytest.raises(CancelledError):
        answer.result()
    service.close()
    assert model.slots.is_closed


def test_an_idle_worker_sleeps(model: HeldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    step = ContinuousBatch.step

    def counted(batch: ContinuousBatch) -> Any:
        rounds.append(1)
        return step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", counted)
    with GenerationService(model) as service:
        model.slots.let()
        first = service.submit(QUESTION).result()
        time.sleep(0.05)
        done = len(rounds)
        time.sleep(0.2)
        assert len(rounds) == done
        assert untimed(service.submit(QUESTION).result()) == untimed(first)


def test_priorities_come_first(model: HeldModel, tmp_path: Path) -> None:
    order: list[str] = []
    with GenerationService(model, ServingOptions(num_slots=1)) as service:
        answers = [service.submit(QUESTION)]
        assert model.slots.has_stepped.wait(20)
        for name, priority in (("later", 1), ("urgent", -1), ("usual", 0)):
            answers.append(
                service.submit(
                    QUESTION, priority=priority, on_end=lambda *_, name=name: order.append(name)
                )
            )
        model.slots.let()
        for answer in answers:
            answer.result()
    assert order == ["urgent", "usual", "later"]
