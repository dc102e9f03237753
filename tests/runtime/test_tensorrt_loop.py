"""The real code of the TensorRT backend on an emulated GPU, beside ONNX Runtime on the CPU."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.device_scenarios import endless, without_end
from support.emulated_engines import EmulatedModel, build_emulated, default_options, open_emulated
from support.loop_scenarios import (
    SAMPLED,
    check_answers,
    check_cancellation,
    check_full_context,
    check_interleaved,
    check_logits_path,
    check_many_generations,
    check_parity,
    check_sampling,
    check_stop_string,
    loop_requests,
)
from support.slot_scenarios import check_slots
from support.trained import EXAMPLES, exported
from tiny.recipes import RECIPES

from vlmport.errors import EngineError, InputError, VlmportError
from vlmport.manifest import load_manifest
from vlmport.runtime import SamplingOptions
from vlmport.runtime.sampling import TokenSampler

if TYPE_CHECKING:
    from vlmport.runtime import VisionLanguageModel

FAMILIES = sorted(RECIPES)
Engines = Callable[..., Path]  # keywords are build options
Opened = Callable[..., EmulatedModel]
Expected = Callable[[str], "VisionLanguageModel"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Emulated engines of a family with some options, written once."""
    top = tmp_path_factory.mktemp("engines")
    built: dict[str, Path] = {}

    def build(family: str, **changes: Any) -> Path:
        key = f"{family}{sorted(changes.items())}"
        if key not in built:
            built[key] = top / str(len(built))
            options = default_options(load_manifest(exported(family)), **changes)
            build_emulated(exported(family), built[key], options)
        return built[key]

    return build


@pytest.fixture
def opened(engines: Engines) -> Iterator[Opened]:
    """Opens models; what they hold at the end is a leak."""
    models: list[EmulatedModel] = []

    def open_(family: str, *, captures: bool = True, **changes: Any) -> EmulatedModel:
        found = open_emulated(exported(family), engines(family, **changes), captures=captures)
        without_end(found.model)
        models.append(found)
        return found

    yield open_
    for found in models:
        found.backend.close()
        gc.collect()
        assert found.cuda.leaks() == []


@pytest.fixture(scope="module")
def expected() -> Expected:
    models: dict[str, VisionLanguageModel] = {}

    def reference(family: str) -> VisionLanguageModel:
        if family not in models:
            models[family] = endless(exported(family))
        return models[family]

    return reference


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_onnxruntime(family: str, opened: Opened, expected: Expected) -> None:
    found = opened(family)
    for batch in (1, 3, 4):
        check_answers(found.model, expected(family), loop_requests(batch))
    check_logits_path(found.model, loop_requests(3))
    assert found.cuda.captured > 0
    assert found.cuda.launches > found.cuda.captured


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_answer_as_a_sequence_alone(family: str, opened: Opened, expected: Expected) -> None:
    found = opened(family)
    check_slots(found.model, expected(family), num_slots=4, cache_tokens=4 * 256)
    assert found.cuda.captured == 4
    assert found.cuda.launches > found.cuda.captured


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_stop_strings_and_cancellation(
    family: str, opened: Opened, expected: Expected
) -> None:
    found = opened(family)
    check_sampling(found.model, expected(family))
    check_stop_string(found.model, expected(family))
    check_cancellation(found.model, expected(family), lambda: int(found.cuda.used))
    check_interleaved(found.model, expected(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_fills_to_its_last_row(family: str, opened: Opened, expected: Expected) -> None:
    reference = expected(family)
    results = reference.generate_batch(loop_requests(2, max_new_tokens=1))
    length = max(result.prompt_tokens for result in results) + 3
    # Pieces that do not divide the prompt; a prompt that sees itself both ways has only one.
    bidirectional = reference.manifest.attention.prompt == "bidirectional"
    chunk = length if bidirectional else 7
    found = opened(family, max_length=length, prefill_chunk=chunk)
    check_full_context(found.model, reference, length)


def test_slots_take_what_the_engines_were_built_for(opened: Opened) -> None:
    found = opened("fuyu")
    with pytest.raises(
        InputError,
        match=r"found 1000 tokens \(cache_tokens\) for 4 slots; each takes the 256 of the engines "
        r"\(max_length\), whatever it holds, so that 3 slots fit; ask for 1024 tokens",
    ):
        found.backend.start_slots(4, 1000)
    with pytest.raises(EngineError, match=r"a batch of 5; its engine takes 1 to 4 rows"):
        found.backend.start_slots(5, 5 * 256)
    with closing(found.backend.start_slots(3, 5000)) as slots:
        assert slots.fits(3, 256)
        assert not slots.fits(1, 257)


def test_slots_begin_where_tensorrt_lets_a_tensor_begin(opened: Opened) -> None:
    found = opened("paligemma", max_length=99, prefill_chunk=99)
    with pytest.raises(EngineError, match=r"found rows of 99 tokens .* a multiple of 64"):
        found.backend.start_slots(2, 2 * 99)
    found.backend.start_slots(1, 99).close()


def test_memory_does_not_grow_in_fifty_generations(opened: Opened) -> None:
    found = opened("fuyu")
    check_many_generations(found.model, lambda: int(found.cuda.used), 50)


@pytest.mark.parametrize(
    "family",
    [name if name == "fuyu" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_graphs_logits_and_tokens_equal_pytorch(family: str, opened: Opened) -> None:
    found = opened(family)
    tokens = load_manifest(exported(family)).special_tokens
    found.model.manifest = replace(found.model.manifest, special_tokens=tokens)
    check_parity(found.model, EXAMPLES / family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_equals_onnxruntime(family: str, tmp_path: Path) -> None:
    bundle = exported(family, "fp16")
    build_emulated(bundle, tmp_path / "engines", default_options(load_manifest(bundle)))
    found = open_emulated(bundle, tmp_path / "engines")
    check_answers(without_end(found.model), endless(bundle), loop_requests(3))
    check_slots(found.model, endless(bundle), num_slots=4, cache_tokens=1024, atol=2e-2)
    found.backend.close()


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED[3]])
def test_steps_allocate_nothing(sampling: SamplingOptions, opened: Opened) -> None:
    found = opened("tinyllava")
    [request] = loop_requests(1, max_new_tokens=9)
    stream = found.model.stream(
        prompt=request.prompt, images=request.images, max_new_tokens=9, sampling=sampling
    )
    next(stream)
    before = (found.cuda.allocations, found.tensorrt.contexts)
    assert len(list(stream)) == 8
    assert (found.cuda.allocations, found.tensorrt.contexts) == before
    # The first step prepares, the second is captured, and all but the first are launched.
    assert (found.cuda.captured, found.cuda.launches) == (1, 7)


def test_a_second_answer_launches_what_the_first_captured(opened: Opened) -> None:
    found = opened("tinyllava")
    requests = loop_requests(2, max_new_tokens=9)
    found.model.generate_batch(requests)
    before = (found.cuda.captured, found.cuda.launches)
    found.model.generate_batch(requests)
    assert (found.cuda.captured, found.cuda.launches) == (before[0], before[1] + 8)


def test_threads_take_turns(opened: Opened, expected: Expected) -> None:
    found, reference = opened("fuyu"), expected("fuyu")
    requests = loop_requests(4, max_new_tokens=6)
    with ThreadPoolExecutor(3) as pool:
        ours = list(pool.map(lambda one: found.model.generate_batch([one])[0], requests * 3))
    theirs = [reference.generate_batch([one])[0] for one in requests] * 3
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]


@pytest.mark.parametrize("who", ["cuda", "tensorrt"])
def test_it_goes_on_without_captured_graphs(
    who: str, opened: Opened, expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    found = opened("fuyu", captures=who != "cuda")
    found.tensorrt.capturable = who != "tensorrt"
    with caplog.at_level(logging.WARNING):
        check_answers(found.model, expected("fuyu"), loop_requests(2))
        check_answers(found.model, expected("fuyu"), loop_requests(1))
    warnings = [one.getMessage() for one in caplog.records if "CUDA graphs" in one.getMessage()]
    assert len(warnings) == 1
    assert "cannot be captured" in warnings[0]
    assert found.cuda.launches == 0


def test_graphs_before_the_decoder_equal_onnxruntime(opened: Opened, expected: Expected) -> None:
    found, reference = opened("idefics2"), expected("idefics2")
    picture = loop_requests(1)[0].images[0]
    prepared = reference.prepare(picture)
    # Patches of padding are garbage on both sides, and masked in the projector.
    np.testing.assert_allclose(
        found.model.image_features(prepared), reference.image_features(prepared), atol=1e-6
    )
    ids = np.array([[5, 6, 7]], np.int64)
    assert (found.model.inputs_embeds(ids) == reference.inputs_embeds(ids)).all()


def test_an_overflow_is_told_and_leaves_nothing_behind(opened: Opened, expected: Expected) -> None:
    found = opened("tinyllava")
    backend = found.backend
    ids = np.array([5, 6, 7], np.int64)
    rows = [backend.embed_prompt(ids, np.zeros(3, np.bool_), ()) for _ in range(2)]
    rows[1].numpy()  # all of it is there
    ctypes.memset(rows[1].address(), 0xFF, rows[1].row_bytes)  # NaN
    vocab_size = found.model.manifest.dimensions.vocab_size
    samplers = [TokenSampler(SamplingOptions(), vocab_size) for _ in rows]
    decoding = backend.start_tokens(samplers, 16, ())
    with pytest.raises(VlmportError, match=r"logits: those of row 1 hold NaN .* wider precision"):
        decoding.prefill(rows)
    decoding.close()
    check_answers(found.model, expected("tinyllava"), loop_requests(2))


def ask(model: VisionLanguageModel, count: int = 1, **changes: Any) -> None:
    model.generate_batch([replace(one, **changes) for one in loop_requests(count)])


def test_too_many_rows(opened: Opened) -> None:
    found = opened("fuyu", max_batch=2)
    with pytest.raises(EngineError, match=r"batch of 3; .* 1 to 2 rows; .*--max-batch 3`"):
        ask(found.model, 3)
    ask(found.model, 2)


def test_too_many_tokens(opened: Opened) -> None:
    found = opened("fuyu", max_length=64)
    [result] = found.model.generate_batch(loop_requests(1, max_new_tokens=200))
    assert result.prompt_tokens + len(result.token_ids) == 64
    with pytest.raises(InputError, match=r"max_length of 64 leaves no room .* build engines"):
        ask(found.model, prompt="What shape is there? " * 20)
    with pytest.raises(EngineError, match=r"found 65 tokens .* holds 64 .*--max-length 65`"):
        found.backend.start(1, 65)


def test_a_prompt_in_one_piece_that_is_too_long(opened: Opened, engines: Engines) -> None:
    # `vlmport build` does not make such engines; those of another vlmport may be such.
    folder = engines("paligemma", max_length=64, prefill_chunk=64)
    found = opened("paligemma", max_length=64, prefill_chunk=64)
    assert folder.is_dir()
    context = found.backend._contexts.prefill
    limits = context._profile.ranges
    smaller = [replace(one, largest=(one.largest[0], 9, *one.largest[2:])) for one in limits[:2]]
    context._profile = replace(context._profile, ranges=(*smaller, *limits[2:]))
    with pytest.raises(
        EngineError,
        match=r"decoder: found sequence_length \d+ \(axis 1 of inputs_embeds\); its profile "
        r"prefill takes 1 to 9; .*--prefill-chunk \d+`",
    ):
        ask(found.model)


def test_a_picture_that_is_too_large(opened: Opened) -> None:
    found = opened("idefics2")
    pixels: dict[str, Any] = {
        "pixel_values": np.zeros((1, 3, 56, 4096), np.float32),
        "patch_counts": np.ones((1, 2), np.int64),
    }
    with pytest.raises(EngineError, match=r"vision_encoder: found width 4096 .* such pictures"):
        found.model.run("vision_encoder", pixels)


def test_out_of_memory(opened: Opened) -> None:
    found = opened("tinyllava")
    free = found.cuda.memory - found.cuda.used
    found.cuda.memory -= free - 1_500_000
    with pytest.raises(
        EngineError,
        match=r"GPU memory: the cache of 4 x 256 tokens \(batch x max_length\) needs .* MiB; "
        r".* of .* are free; .*--max-batch, --max-length or --prefill-chunk.*smaller precision",
    ):
        ask(found.model, 4)
    found.cuda.memory = 1 << 30
    ask(found.model, 4)
