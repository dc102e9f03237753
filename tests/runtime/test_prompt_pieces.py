from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlmport.contract import AttentionForm
from vlmport.runtime.prompt_pieces import longest_piece, prompt_pieces


def spans(length: int, longest: int | None, start: int = 0) -> list[tuple[int, int]]:
    pieces = prompt_pieces(np.array([length]), 0, longest, start)
    return [(piece.start, piece.stop) for piece in pieces]


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 7, 512, None])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_pieces_follow_each_other(longest: int | None, start: int) -> None:
    for length in range(start + 1, 40):
        found = spans(length, longest, start)
        assert found[0][0] <= start
        assert found[-1][1] == length
        assert all(left[1] == right[0] for left, right in itertools.pairwise(found))
        assert all(0 < stop - first <= (longest or length) for first, stop in found)


@pytest.mark.parametrize("longest", [3, 4, 7, None])
def test_no_token_runs_alone(longest: int | None) -> None:
    for length in range(2, 40):
        for start in range(length):
            assert all(stop - first > 1 for first, stop in spans(length, longest, start))
    assert spans(1, longest) == [(0, 1)]


def test_one_token_more_than_a_piece() -> None:
    assert spans(513, 512) == [(0, 511), (511, 513)]
    assert spans(30, None, 29) == [(28, 30)]


def test_rows_of_different_lengths() -> None:
    first, second = prompt_pieces(np.array([3, 9, 5]), 1, 5)
    assert first.position_ids.tolist() == [[1, 2, 3, 4, 5]] * 3
    assert first.ends_here.tolist() == [True, False, True]
    assert first.valid_lengths.tolist() == [3, 5, 5]
    assert second.write_indices.tolist() == [5, 5, 5]
    assert second.ends_here.tolist() == [False, True, False]
    # Rows that end elsewhere choose any valid row.
    assert second.valid_lengths.tolist() == [6, 9, 6]
    assert set(second.inputs()) == {"position_ids", "write_indices", "valid_lengths"}


def test_prompts_that_see_themselves_are_not_cut() -> None:
    assert longest_piece(AttentionForm("bidirectional", 1), 64) is None
    assert longest_piece(AttentionForm("causal", 0), 64) == 64
