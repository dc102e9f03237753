from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from vlmport.errors import VlmportError
from vlmport.runtime.host_prompt import HostRows, fuse_image_features
from vlmport.runtime.host_tokens import HostTokenDecoding
from vlmport.runtime.sampling import SamplingOptions, TokenSampler

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCAB = 5


@dataclass
class ScriptedDecoding:
    """A `vlmport.runtime.backends.base.Decoding` that answers with given logits.

    Attributes:
        logits: float32 [steps, batch, vocab_size], the prompt's step first.
        asked: arguments of every call.
        is_closed: whether `close` was called.
    """

    logits: NDArray[np.float32]
    asked: list[tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=list)
    is_closed: bool = False

    def prefill(
        self, inputs_embeds: NDArray[np.floating[Any]], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        return self._answer(inputs_embeds, lengths)

    def step(self, token_ids: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        return self._answer(token_ids, active)

    def close(self) -> None:
        self.is_closed = True

    def _answer(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float32]:
        self.asked.append((first.copy(), second.copy()))
        logits: NDArray[np.float32] = self.logits[len(self.asked) - 1].copy()
        return logits


def prompts(*lengths: int) -> list[HostRows]:
    return [HostRows(np.full((length, 3), length, np.float32)) for length in lengths]


def logits_for(*token_ids: list[int]) -> NDArray[np.float32]:
    """Logits whose highest are the given tokens of each step."""
    logits = np.zeros((len(token_ids), len(token_ids[0]), VOCAB), np.float32)
    np.put_along_axis(logits, np.array(token_ids)[:, :, None], 1.0, axis=2)
    return logits


def greedy(batch: int) -> list[TokenSampler]:
    return [TokenSampler(SamplingOptions(), VOCAB) for _ in range(batch)]


def test_prompts_are_padded_and_chosen_tokens_go_into_the_next_step() -> None:
    scripted = ScriptedDecoding(logits_for([3, 1], [2, 4]))
    decoding = HostTokenDecoding(scripted, greedy(2), [])
    assert decoding.prefill(prompts(2, 1)).tolist() == [3, 1]
    assert decoding.step(np.array([True, True])).tolist() == [2, 4]
    embeds, lengths = scripted.asked[0]
    assert lengths.tolist() == [2, 1]
    assert embeds[:, :, 0].tolist() == [[2, 2], [1, 0]]
    assert scripted.asked[1][0].tolist() == [3, 1]


def test_rows_that_have_ended_choose_nothing() -> None:
    logits = logits_for([3, 1], [2, 4], [0, 2])
    logits[1, 0] = np.nan
    decoding = HostTokenDecoding(ScriptedDecoding(logits), greedy(2), [])
    decoding.prefill(prompts(1, 1))
    assert decoding.step(np.array([False, True]))[1] == 4
    assert decoding.step(np.array([False, True]))[1] == 2


def test_overflow_in_an_active_row_is_reported() -> None:
    logits = logits_for([3, 1])
    logits[0, 1, 2] = np.nan
    decoding = HostTokenDecoding(ScriptedDecoding(logits), greedy(2), [])
    with pytest.raises(VlmportError, match="overflowed"):
        decoding.prefill(prompts(1, 1))


def test_suppressed_tokens_are_not_chosen_and_shown_as_such() -> None:
    shown: list[NDArray[np.float32]] = []
    scripted = ScriptedDecoding(logits_for([3]))
    decoding = HostTokenDecoding(scripted, greedy(1), [3, 0], on_logits=shown.append)
    assert decoding.prefill(prompts(1)).tolist() == [1]
    lowest = np.finfo(np.float32).min
    assert shown[0].tolist() == [[lowest, 0, 0, lowest, 0]]


def test_answer_is_the_callers_own() -> None:
    decoding = HostTokenDecoding(ScriptedDecoding(logits_for([3], [2])), greedy(1), [])
    first = decoding.prefill(prompts(1))
    decoding.step(np.array([True]))
    assert first.tolist() == [3]


def test_close_reaches_the_cache() -> None:
    scripted = ScriptedDecoding(logits_for([3]))
    HostTokenDecoding(scripted, greedy(1), []).close()
    assert scripted.is_closed


def test_image_features_take_their_places_and_the_rest_is_cut() -> None:
    embeds = np.zeros((4, 2), np.float32)
    mask = np.array([False, True, True, False])
    features = [HostRows(np.full((count, 2), count, np.float32)) for count in (1, 3)]
    fused = fuse_image_features(embeds, mask, features)
    assert fused[:, 0].tolist() == [0, 1, 3, 0]
    assert not embeds.any()
    assert len(features[1]) == 3
