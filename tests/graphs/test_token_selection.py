from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_builds import built_source, parsed_layers
from support.engine_graphs import one_profile
from support.token_selection import could_choose, greedy, host_choice, sampled, selection

from vlmport.contract_engines import SELECT_GREEDY, SELECT_SAMPLED
from vlmport.graphs.engine_source import source_of
from vlmport.graphs.token_selection import selection_graphs
from vlmport.runtime.sampling import SamplingOptions, TokenSampler

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

BATCH = 8
LOWEST = np.finfo(np.float32).min


def random_logits(random: np.random.Generator, vocab_size: int) -> NDArray[np.float32]:
    """Flat ones, peaked ones, some shifted, some rounded as bfloat16 rounds: many are equal."""
    scale, shift = random.choice([0.01, 1.0, 3.0, 10.0]), random.choice([0.0, 0.0, 40.0, -40.0])
    normal = random.normal(scale=scale, size=vocab_size) + shift
    logits: NDArray[np.float32] = normal.astype(np.float32)
    if random.random() < 0.5:
        logits.view(np.uint32)[:] &= np.uint32(0xFFFF0000)
    return logits


def random_options(random: np.random.Generator, vocab_size: int) -> SamplingOptions:
    # No round top_p: a half of two equal tokens is as much a matter of rounding on the host.
    return SamplingOptions(
        temperature=float(random.choice([0.0, 0.5, 1.0, 1.7], p=[0.1, 0.3, 0.3, 0.3])),
        top_k=int(random.choice([0, 1, 3, 50, vocab_size // 2, vocab_size + 9])),
        top_p=float(random.choice([1.0, 0.9993, 0.9137, 0.4871, 0.1031, 1e-6])),
        min_p=float(random.choice([0.0, 0.0, 0.02, 0.5, 1.0])),
        repetition_penalty=float(random.choice([1.0, 1.3, 0.8])),
        frequency_penalty=float(random.choice([0.0, 0.7, -0.5])),
        presence_penalty=float(random.choice([0.0, 0.7, -0.5])),
        seed=int(random.integers(1 << 30)),
    )


def count_differences(vocab_size: int, trials: int, seed: int) -> tuple[int, int]:
    """Tokens that the graph and the host choose apart, of how many, over steps of an answer.

    Raises:
        AssertionError: if one of them lies at no edge.
    """
    random, differences = np.random.default_rng(seed), 0
    for _ in range(trials):
        options = [random_options(random, vocab_size) for _ in range(BATCH)]
        hosts = [TokenSampler(row, vocab_size) for row in options]
        drawing = [TokenSampler(row, vocab_size) for row in options]
        prompt = random.integers(0, vocab_size, min(20, vocab_size // 2))
        for sampler in (*hosts, *drawing):
            sampler.start(prompt)
        suppressed = [int(random.integers(vocab_size))]
        state = selection(vocab_size, hosts)
        logits = np.stack([random_logits(random, vocab_size) for _ in range(BATCH)])
        for _ in range(4):
            uniforms = [sampler.draw() for sampler in drawing]
            masked = logits.copy()
            masked[:, suppressed] = LOWEST
            penalised = [h._penalised(row) for h, row in zip(hosts, masked, strict=True)]
            expected = [h.select(row) for h, row in zip(hosts, masked, strict=True)]
            state = sampled(logits, options, uniforms, state, suppressed)
            assert not state.faulty.any()
            for row, token in enumerate(state.token_ids.tolist()):
                if token == expected[row]:
                    continue
                differences += 1
                assert could_choose(token, penalised[row], options[row], uniforms[row]), options[
                    row
                ]
                # Both go on with the host's token.
                state.counts[row], state.seen[row] = hosts[row]._counts, hosts[row].seen
            for row, sampler in enumerate(hosts):
                np.testing.assert_array_equal(state.counts[row], sampler._counts)
                np.testing.assert_array_equal(state.seen[row], sampler.seen)
    return differences, trials * 4 * BATCH


@pytest.mark.parametrize(
    ("vocab_size", "trials"), [(7, 60), (33, 60), (500, 60), (5000, 40), (50000, 3)]
)
def test_chosen_tokens_are_those_of_the_host(vocab_size: int, trials: int) -> None:
    differences, chosen = count_differences(vocab_size, trials, seed=vocab_size)
    assert differences <= 0.001 * chosen


@pytest.mark.slow
def test_chosen_tokens_of_a_large_vocabulary_are_those_of_the_host() -> None:
    differences, chosen = count_differences(262144, trials=4, seed=1)
    assert differences <= 0.01 * chosen  # one of 128


@given(
    logits=st.lists(st.integers(-1200, 1200), min_size=7, max_size=7),
    step=st.sampled_from([1.0, 2.0**-6, 2.0**-12]),
    temperature=st.floats(0.0625, 5.0, width=32),
    top_k=st.integers(0, 8),
    top_p=st.floats(2.0**-10, 1.0, width=32),
    min_p=st.floats(0.0, 1.0, width=32),
    uniform=st.integers(0, 2**24 - 1),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_options_choose_what_the_host_chooses(
    logits: list[int],
    step: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: int,
) -> None:
    row = np.array(logits, np.float32) * np.float32(step)
    options = SamplingOptions(temperature, top_k, top_p, min_p)
    place = uniform / 2**24
    token = int(sampled(row[None], [options], [place]).token_ids[0])
    assert token == host_choice(row, options, place) or could_choose(token, row, options, place)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_draws_have_the_distribution_of_the_temperature(temperature: float) -> None:
    logits = np.array([1.5, -0.25, 0.0, 2.0, -3.0, 1.5, 0.7], np.float32)
    draws = 20000  # one in the middle of each part of [0, 1)
    options = [SamplingOptions(temperature=temperature)] * draws
    places = (np.arange(draws) + 0.5) / draws
    answer = sampled(np.broadcast_to(logits, (draws, 7)).copy(), options, places)
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = weights / weights.sum() * draws
    np.testing.assert_allclose(np.bincount(answer.token_ids, minlength=7), expected, atol=1.1)


def test_all_tokens_of_a_flat_vocabulary_can_be_drawn() -> None:
    vocab_size = 900
    options = [SamplingOptions(temperature=1.0)] * vocab_size
    places = (np.arange(vocab_size) + 0.5) / vocab_size
    answer = sampled(np.zeros((vocab_size, vocab_size), np.float32), options, places)
    np.testing.assert_array_equal(answer.token_ids, np.arange(vocab_size))


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 0.8])
def test_equal_tokens_stay_in_the_order_of_their_ids_until_top_p_is_reached(top_p: float) -> None:
    logits = np.array([0, 5, 0, 5, 5, 0, 5], np.float32) * 20
    options = SamplingOptions(temperature=1.0, top_p=top_p)
    places = np.linspace(0.01, 0.99, 25)
    answer = sampled(np.tile(logits, (25, 1)), [options] * 25, places)
    stay = [1, 3, 4, 6][: int(np.ceil(4 * top_p))]
    assert set(answer.token_ids.tolist()) == set(stay)
    assert answer.token_ids.tolist() == [host_choice(logits, options, u) for u in places]


def test_equal_tokens_at_the_border_of_top_k_all_stay() -> None:
    logits = np.array([3, 2, 1, 2, 2, 0], np.float32)
    options = [SamplingOptions(temperature=1.0, top_k=2)] * 50
    answer = sampled(np.tile(logits, (50, 1)), options, np.linspace(0.0, 0.999, 50))
    assert set(answer.token_ids.tolist()) == {0, 1, 3, 4}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-30])  # the latter is 1 in float32
def test_ends_of_the_draw_take_tokens_that_are_kept(uniform: float) -> None:
    logits = np.array([9, 1, 1, 1, 1, 9], np.float32)
    options = SamplingOptions(temperature=1.0, top_k=4)
    answer = sampled(logits[None], [options], [uniform], suppressed=(0, 5))
    assert answer.token_ids.tolist() == [1 if uniform == 0 else 4]


def test_suppressed_tokens_are_never_chosen_however_likely() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(200, 33)).astype(np.float32)
    suppressed = (4, 0, 32)
    logits[:, suppressed] = 50
    options = [random_options(random, 33) for _ in range(200)]
    for answer in (
        sampled(logits, options, random.random(200), suppressed=suppressed),
        greedy(logits, suppressed),
    ):
        assert not set(answer.token_ids.tolist()) & set(suppressed)
        assert not answer.faulty.any()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_greedy_takes_the_first_of_equal_logits(batch: int) -> None:
    logits = np.random.default_rng(0).integers(-3, 3, (batch, 500)).astype(np.float32)
    expected = logits.argmax(axis=1)
    answer = sampled(logits, [SamplingOptions()] * batch, [0.5] * batch)
    for found in (greedy(logits), answer):
        np.testing.assert_array_equal(found.token_ids, expected)


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-37])
@pytest.mark.parametrize("shift", [-9.0, -2.0, 0.0, 9.0])
def test_temperature_near_zero_is_greedy(temperature: float, shift: float) -> None:
    logits = np.array([[0, 2, 1, -1]], np.float32) + np.float32(shift)
    answer = sampled(logits, [SamplingOptions(temperature=temperature)], [0.999])
    assert answer.token_ids.tolist() == [1]
    assert not answer.faulty.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 17, 32])
def test_numbers_that_are_none_are_told_and_disturb_no_other_row(bad: float, place: int) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 33)).astype(np.float32)
    uniforms = random.random(3)
    options = [SamplingOptions(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01)] * 3
    good, good_greedy = sampled(logits, options, uniforms), greedy(logits)
    logits[1, place] = bad
    for before, answer in (
        (good, sampled(logits, options, uniforms)),
        (good_greedy, greedy(logits)),
    ):
        assert answer.faulty.tolist() == [False, True, False]
        assert answer.token_ids[[0, 2]].tolist() == before.token_ids[[0, 2]].tolist()
        assert 0 <= answer.token_ids[1] < 33  # it is an index of the embedding table


def test_logits_without_any_number_are_faulty() -> None:
    logits = np.array([[-np.inf] * 7, [np.nan] * 7, [0] * 7], np.float32)
    options = [SamplingOptions(temperature=1.0, top_p=0.5)] * 3
    for answer in (greedy(logits), sampled(logits, options, [0.1, 0.5, 0.9])):
        assert answer.faulty.tolist() == [True, True, False]
        assert ((answer.token_ids >= 0) & (answer.token_ids < 7)).all()


def test_a_fault_at_a_suppressed_token_does_not_matter() -> None:
    logits = np.array([[np.nan, 1, 2]], np.float32)
    options = [SamplingOptions(temperature=1.0, top_k=1)]
    for answer in (greedy(logits, [0]), sampled(logits, options, [0.5], suppressed=[0])):
        assert (answer.token_ids.tolist(), answer.faulty.tolist()) == ([2], [False])


@pytest.mark.parametrize("vocab_size", [32000, 262144])
@pytest.mark.parametrize("name", [SELECT_GREEDY, SELECT_SAMPLED])
def test_graphs_build_with_tensorrt(name: str, vocab_size: int, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.onnx"
    model = selection_graphs(vocab_size)[name]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    source = source_of(model, path, name)
    assert built_source(source, one_profile(source, batch=(1, 1, 8))).warnings == ()
    layers = parsed_layers(path)
    # Rounded by TF32, limited to 3840, or without a promise: none of these may come in.
    unwanted = {"MATRIX_MULTIPLY", "TOPK", "SORT", "CUMULATIVE", "LOOP", "PLUGIN_V3"}
    assert not unwanted & layers.keys()
    assert layers["REDUCE"] >= 3
