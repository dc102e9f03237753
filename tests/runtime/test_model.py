from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import Recipe, make_checkpoint
from support.slot_scenarios import check_slots

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.errors import InputError
from vlmport.export.family import load_reference
from vlmport.export.reference import IMAGE_TOKEN
from vlmport.runtime import Request, SamplingOptions, VisionLanguageModel
from vlmport.runtime.backends.onnxruntime import OnnxRuntimeDecoding

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.export.reference import Reference

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8))
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", Recipe())


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> VisionLanguageModel:
    bundle = checkpoint.parent / "bundle"
    export(ExportOptions(checkpoint, bundle), SilentProgress())
    loaded = VisionLanguageModel.load(bundle)
    # Answers of any length: the random model's end token would cut some of them short.
    tokens = replace(loaded.manifest.special_tokens, eos_token_ids=())
    loaded.manifest = replace(loaded.manifest, special_tokens=tokens)
    return loaded


def test_long_prompt_in_pieces_equals_the_reference(
    model: VisionLanguageModel, reference: Any
) -> None:
    prompt = "shapes and colours " * 40
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    endless = replace(reference, special_tokens=model.manifest.special_tokens)
    answer = endless.greedy(messages, [IMAGE], 40)
    steps: list[Any] = []
    result = model.generate(
        prompt=prompt,
        images=[IMAGE],
        max_new_tokens=40,
        on_logits=lambda logits: steps.append(logits[0].copy()),
    )
    assert result.prompt_tokens > 512 < 1024
    assert result.token_ids == tuple(answer.token_ids)
    np.testing.assert_allclose(np.array(steps), answer.logits, atol=1e-4)


def test_answer_longer_than_the_first_capacity_equals_the_reference(
    model: VisionLanguageModel, reference: Any
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    endless = replace(reference, special_tokens=model.manifest.special_tokens)
    answer = endless.greedy(messages, [], 400)
    result = model.generate(prompt=QUESTION, max_new_tokens=400)
    assert result.token_ids == tuple(answer.token_ids)
    assert result.finish_reason == "length"


def test_slots_answer_as_a_sequence_alone(model: VisionLanguageModel) -> None:
    check_slots(model, model, num_slots=4, cache_tokens=2000, texts=(1, 2, 65, 600))


def test_generation_ends_at_max_length(model: VisionLanguageModel) -> None:
    limit = model.manifest.dimensions.max_length
    result = model.generate(prompt=QUESTION, max_new_tokens=10 * limit)
    assert result.prompt_tokens + result.generated_tokens == limit
    assert result.finish_reason == "length"


def test_rows_that_end_early_do_not_disturb_the_others(model: VisionLanguageModel) -> None:
    lengths = (3, 200, 40)
    requests = [
        Request(prompt=QUESTION * (index + 1), images=(IMAGE,) * index, max_new_tokens=length)
        for index, length in enumerate(lengths)
    ]
    together = model.generate_batch(requests)
    assert tuple(result.generated_tokens for result in together) == lengths
    for request, result in zip(requests, together, strict=True):
        assert model.generate_batch([request])[0].token_ids == result.token_ids


def test_long_row_that_ends_does_not_outgrow_max_length(model: VisionLanguageModel) -> None:
    limit = model.manifest.dimensions.max_length
    filler = "shapes and colours " * 60
    requests = [
        Request(prompt=filler, max_new_tokens=2),
        Request(prompt=QUESTION, max_new_tokens=limit),
    ]
    long, short = model.generate_batch(requests)
    assert long.generated_tokens == 2
    assert short.prompt_tokens + short.generated_tokens == limit


def test_stream_adds_up_to_the_result(model: VisionLanguageModel) -> None:
    pieces = list(model.stream(prompt=QUESTION, images=[IMAGE], max_new_tokens=30))
    result = model.generate(prompt=QUESTION, images=[IMAGE], max_new_tokens=30)
    assert tuple(piece.token_id for piece in pieces) == result.token_ids
    assert "".join(piece.text for piece in pieces).startswith(result.text[:5])


def test_stop_string_ends_the_answer_and_is_not_part_of_it(model: VisionLanguageModel) -> None:
    whole = model.generate(prompt=QUESTION, max_new_tokens=60).text
    stop = whole[10:13]
    result = model.generate(prompt=QUESTION, max_new_tokens=60, stop_strings=[stop])
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]


def test_end_token_ends_the_answer(model: VisionLanguageModel) -> None:
    first = model.generate(prompt=QUESTION, max_new_tokens=5).token_ids
    tokens = replace(model.manifest.special_tokens, eos_token_ids=(first[2],))
    ending = VisionLanguageModel(
        replace(model.manifest, special_tokens=tokens), model.tokenizer, model._backend
    )
    result = ending.generate(prompt=QUESTION, max_new_tokens=60)
    assert result.token_ids == first[: first.index(first[2]) + 1]
    assert result.finish_reason == "stop"


def test_sampling_is_repeatable_by_seed_alone_and_in_a_batch(model: VisionLanguageModel) -> None:
    def request(seed: int) -> Request:
        sampling = SamplingOptions(temperature=1.0, top_k=40, top_p=0.9, seed=seed)
        return Request(prompt=QUESTION, max_new_tokens=20, sampling=sampling)

    alone = [model.generate_batch([request(seed)])[0].token_ids for seed in (1, 2)]
    together = model.generate_batch([request(1), request(2), request(1)])
    assert [result.token_ids for result in together] == [alone[0], alone[1], alone[0]]
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "<image> and <image>?"}, "found 2 places for images"),
        ({"prompt": QUESTION, "max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({}, "found neither of prompt and messages"),
        ({"prompt": QUESTION, "stop_strings": [""]}, "found an empty text"),
    ],
)
def test_requests_that_cannot_be_answered_say_why(
    model: VisionLanguageModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(images=[IMAGE], **arguments)
    with pytest.raises(InputError, match=message):
        model.stream(images=[IMAGE], **arguments)


def test_a_prompt_that_leaves_no_room_says_so(model: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="leaves no room for an answer"):
        model.generate(prompt="shapes and colours " * 200)


def test_images_and_image_parts_must_agree(model: VisionLanguageModel) -> None:
    from vlmport.runtime.messages import parse_messages

    messages = parse_messages([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(InputError, match="found 2, the messages have 1 image parts"):
        model.generate(messages=messages, images=[IMAGE, IMAGE])


def test_several_turns_render_as_the_reference_renders_them(
    model: VisionLanguageModel, reference: Any
) -> None:
    from vlmport.runtime.messages import parse_messages

    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And here?"}]},
    ]
    prompt = model.encode(parse_messages(chat), [model.prepare(IMAGE).layout] * 2)
    answer = reference.greedy(chat, [IMAGE, IMAGE], 1)
    ids = np.where(prompt.image_mask, IMAGE_TOKEN, prompt.input_ids)
    np.testing.assert_array_equal(ids, answer.prompt_ids)
    assert prompt.text.endswith("And here? ASSISTANT:")
    assert "ASSISTANT: A red circle.</s>USER: <image>\n" in prompt.text


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[OnnxRuntimeDecoding]:
    """The decodings that were closed."""
    found: list[OnnxRuntimeDecoding] = []
    close = OnnxRuntimeDecoding.close

    def keep(decoding: OnnxRuntimeDecoding) -> None:
        found.append(decoding)
        close(decoding)

    monkeypatch.setattr(OnnxRuntimeDecoding, "close", keep)
    return found


def _stop_early(model: VisionLanguageModel) -> None:
    pieces = model.stream(prompt=QUESTION, max_new_tokens=9)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # a generator, as every iterator of this kind


def _fail_in_the_middle(model: VisionLanguageModel) -> None:
    def fail(piece: object) -> None:
        raise KeyError(piece)

    with pytest.raises(KeyError):
        model.generate(prompt=QUESTION, max_new_tokens=9, on_piece=fail)


def _leave_the_rest(model: VisionLanguageModel) -> None:
    next(model.forced_logits(Request(prompt=QUESTION), [5, 6, 7]))


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.generate(prompt=QUESTION, max_new_tokens=3),
        lambda model: model.generate(prompt=QUESTION, max_new_tokens=3, on_logits=len),
        _stop_early,
        _fail_in_the_middle,
        _leave_the_rest,
    ],
)
def test_cache_is_given_back_however_the_answer_ends(
    ask: Any, model: VisionLanguageModel, closed: list[OnnxRuntimeDecoding]
) -> None:
    ask(model)
    [decoding] = closed
    assert decoding._cache.arrays == []


def test_who_asks_for_logits_gets_the_same_answer(model: VisionLanguageModel) -> None:
    sampling = SamplingOptions(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)
    requests = [Request(prompt=QUESTION, max_new_tokens=n, sampling=sampling) for n in (4, 12)]
    steps: list[tuple[int, ...]] = []
    seen = model.generate_batch(requests, on_logits=lambda logits: steps.append(logits.shape))
    unseen = model.generate_batch(requests)
    assert [result.token_ids for result in seen] == [result.token_ids for result in unseen]
    assert steps == [(2, model.manifest.dimensions.vocab_size)] * 12
