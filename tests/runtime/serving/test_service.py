"""The service with trained bundles: every answer is the one that the request gets alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.served_models import questions, served_model, untimed

from vlmport.errors import InputError
from vlmport.runtime import (
    GenerationResult,
    GenerationService,
    Piece,
    Request,
    SamplingOptions,
    ServingOptions,
    VisionLanguageModel,
)

FAMILIES = ("fuyu", "idefics2", "paligemma", "tinyllava")


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return served_model("tinyllava")


@pytest.fixture
def service(model: VisionLanguageModel) -> Iterator[GenerationService]:
    with GenerationService(model) as opened:
        yield opened


def mixed(checkpoint: str, count: int) -> list[Request]:
    """Questions, some of them answered by chance and some cut off."""
    options = (SamplingOptions(), SamplingOptions(temperature=1.5, seed=7), SamplingOptions())
    return [
        replace(
            request,
            sampling=options[number % 3],
            max_new_tokens=(12, 24, 2)[number % 3],
            stop_strings=("e",) if number % 5 == 4 else (),
        )
        for number, request in enumerate(questions(checkpoint, count))
    ]


def alone(model: VisionLanguageModel, requests: list[Request]) -> list[GenerationResult]:
    return [untimed(model.generate_batch([request])[0]) for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_that_requests_get_alone(family: str) -> None:
    model = served_model(family)
    requests = mixed(family, 12)
    expected = alone(model, requests)
    with GenerationService(model, ServingOptions(num_slots=3)) as service:
        answers = [service.submit(request) for request in requests]
        for answer, result in zip(answers, expected, strict=True):
            tokens = (answer.prompt_tokens, answer.image_tokens)
            assert tokens == (result.prompt_tokens, result.image_tokens)
            pieces = list(answer)
            assert "".join(piece.text for piece in pieces) == result.text
            assert tuple(piece.token_id for piece in pieces) == result.token_ids
            assert untimed(answer.result()) == result
        again = [service.submit(request).result() for request in requests]
        assert [untimed(result) for result in again] == expected
        told = service.statistics()
    assert (told.finished, told.free_slots, told.active, told.waiting) == (24, 3, 0, 0)
    assert (told.cancelled, told.late, told.failed, told.refused) == (0, 0, 0, 0)
    assert told.generated_tokens == 2 * sum(result.generated_tokens for result in expected)
    assert told.prompt_tokens == 2 * sum(result.prompt_tokens for result in expected)
    assert 0 < told.reused_prompt_tokens < told.prompt_tokens
    assert told.feature_hits == told.feature_misses > 0
    assert told.feature_bytes > 0
    assert told.prefix_bytes > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_event_loops_get_the_same(family: str) -> None:
    model = served_model(family)
    requests = mixed(family, 8)

    async def ask(service: GenerationService, request: Request) -> GenerationResult:
        answer = await service.submit_async(request)
        token_ids = [piece.token_id async for piece in answer]
        result = await answer
        assert tuple(token_ids) == result.token_ids
        return untimed(result)

    async def ask_all(service: GenerationService) -> list[GenerationResult]:
        return await asyncio.gather(*(ask(service, request) for request in requests))

    with GenerationService(model) as service:
        assert asyncio.run(ask_all(service)) == alone(model, requests)


def test_requests_of_many_threads_at_once(
    model: VisionLanguageModel, service: GenerationService
) -> None:
    requests = mixed("tinyllava", 8) * 4
    expected = alone(model, requests[:8]) * 4
    together = threading.Barrier(32)

    def ask(request: Request) -> GenerationResult:
        together.wait(60)
        return untimed(service.submit(request).result())

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, requests)) == expected
    # Simultaneous or not, a picture is encoded once.
    assert service.statistics().feature_misses == 8
    assert service.statistics().finished == 32


def test_the_model_answers_beside_its_service(
    model: VisionLanguageModel, service: GenerationService
) -> None:
    requests = mixed("tinyllava", 6)
    expected = alone(model, requests)
    answers = [service.submit(request) for request in requests]
    assert alone(model, requests) == expected
    assert [untimed(answer.result()) for answer in answers] == expected


def test_callbacks_get_every_piece_and_the_end(service: GenerationService) -> None:
    pieces: list[Piece] = []
    ends: list[object] = []
    threads: set[str] = set()

    def on_end(result: GenerationResult | None, error: object) -> None:
        threads.add(threading.current_thread().name)
        ends.append((result, error))

    def on_piece(piece: Piece) -> None:
        threads.add(threading.current_thread().name)
        pieces.append(piece)

    answer = service.submit(questions("tinyllava", 1)[0], on_piece=on_piece, on_end=on_end)
    result = answer.result()
    assert list(answer) == list(answer) == pieces
    service.close()  # on_end comes after the answer's end
    assert ends == [(result, None)]
    assert threads == {"vlmport-serving"}
    assert result.ttft_ms > 0


def test_pictures_are_known_by_their_content(
    service: GenerationService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = questions("tinyllava", 1)[0]
    path = request.images[0]
    assert isinstance(path, Path)
    (tmp_path / "copy.png").write_bytes(path.read_bytes())
    with Image.open(path) as opened:
        pillow = opened.copy()
    expected = service.submit(request).result().token_ids

    def misses(image: Path | bytes | Image.Image) -> int:
        before = service.statistics().feature_misses
        answer = service.submit(replace(request, images=(image,)))
        assert answer.result().token_ids == expected
        return service.statistics().feature_misses - before

    # Decoding, preprocessing and the image graphs are passed over.
    with monkeypatch.context() as patched:
        patched.setattr("vlmport.runtime.image_file._opened", None)
        patched.setattr("vlmport.runtime.model.prepare_image", None)
        assert misses(tmp_path / "copy.png") == 0
        assert misses(path.read_bytes()) == 0
    assert misses(pillow) == 1  # by its pixels
    assert misses(pillow.copy()) == 0
    other = questions("tinyllava", 2)[1].images[0]
    before = service.statistics().feature_misses
    service.submit(replace(request, images=(other,))).result()
    assert service.statistics().feature_misses == before + 1


def test_memory_of_features_is_bounded(model: VisionLanguageModel) -> None:
    requests = questions("tinyllava", 6)
    with GenerationService(model) as service:
        service.submit(requests[0]).result()
        one = service.statistics().feature_bytes
    with GenerationService(model, ServingOptions(feature_bytes=3 * one)) as service:
        for request in requests:
            service.submit(request).result()
        assert service.statistics().feature_bytes == 3 * one
        service.submit(requests[5]).result()
        service.submit(requests[0]).result()
        told = service.statistics()
    assert (told.feature_hits, told.feature_misses) == (1, 7)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt="What?", images=(b"not a picture",)), "^image: not a picture"),
        (Request(prompt="What?", images=("nothing.png",)), "nothing.png: no such file"),
        (Request(prompt="<image>" * 2, images=()), "found 2 places for images"),
        (Request(prompt="what " * 3000), "leaves no room for an answer"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(
    service: GenerationService, request_: Request, message: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("called")

    with pytest.raises(InputError, match=message):
        service.submit(request_, on_piece=never, on_end=never)
    with pytest.raises(InputError, match=message):
        asyncio.run(_submit(service, request_))
    told = service.statistics()
    assert (told.failed, told.waiting) == (2, 0)
    assert service.submit(questions("tinyllava", 1)[0]).result().text


async def _submit(service: GenerationService, request: Request) -> None:
    await service.submit_async(request)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"priority": "high"}, "^priority: found 'high'; expected a whole number"),
        ({"priority": True}, "^priority: found True; expected a whole number"),
        ({"timeout_s": 0}, "^timeout_s: found 0; expected a number of seconds above 0"),
        ({"timeout_s": float("nan")}, "^timeout_s: found nan; expected a number"),
        ({"timeout_s": "1"}, "^timeout_s: found '1'; expected a number"),
    ],
)
def test_limits_of_another_kind_are_refused(
    service: GenerationService, limits: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        service.submit(questions("tinyllava", 1)[0], **limits)
    assert service.statistics().waiting == 0


def test_what_is_longer_than_the_cache_is_refused_at_once(model: VisionLanguageModel) -> None:
    request = replace(questions("tinyllava", 1)[0], max_new_tokens=12)
    with GenerationService(model, ServingOptions(cache_tokens=128)) as service:
        with pytest.raises(InputError, match="the service's cache is smaller"):
            service.submit(replace(request, max_new_tokens=200))
        assert untimed(service.submit(request).result()) == alone(model, [request])[0]
        told = service.statistics()
    assert (told.failed, told.finished, told.waiting) == (1, 1, 0)


def test_the_image_graphs_do_not_run_for_a_prompt_that_is_too_long(
    service: GenerationService,
) -> None:
    request = questions("tinyllava", 1)[0]
    with pytest.raises(InputError, match="leaves no room for an answer"):
        service.submit(replace(request, prompt="what " * 3000))
    assert service.statistics().feature_misses == 0
