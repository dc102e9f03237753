from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_slots import TOKEN_BYTES, FakeStored

from vlmport.runtime.serving.prefix_key import PrefixKey
from vlmport.runtime.serving.prefix_store import PrefixStore

Tokens = tuple[int, ...]


def key(tokens: Tokens, *images: int) -> PrefixKey:
    digests = tuple(hashlib.sha256(bytes([image])).digest() for image in images)
    return PrefixKey(np.array(tokens, np.int64), digests)


def stored(tokens: Tokens) -> FakeStored:
    return FakeStored(tuple((float(token), 0) for token in tokens))


def keep(store: PrefixStore, tokens: Tokens, *images: int) -> None:
    store.keep(key(tokens, *images), TOKEN_BYTES * len(tokens), lambda: stored(tokens))


def found(store: PrefixStore, tokens: Tokens, *images: int) -> int:
    result = store.find(key(tokens, *images))
    return 0 if result is None else result[1]


def test_the_longest_common_beginning_is_found() -> None:
    store = PrefixStore(1000, is_whole=False)
    keep(store, (1, 2, 3, 4))
    keep(store, (1, 2, 9))
    keep(store, (5,))
    assert found(store, (1, 2, 3, 7)) == 3
    assert found(store, (1, 2, 8)) == 2
    assert found(store, (5, 6)) == 1
    assert found(store, (6,)) == 0
    assert found(store, (1, 2, 3, 4)) == 4
    assert store.find(key((1, 2, 3, 7)), longer_than=3) is None


def test_pictures_are_compared_by_content() -> None:
    store = PrefixStore(1000, is_whole=False)
    keep(store, (1, -1, -1, 2, -2, 3), 7, 8)
    assert found(store, (1, -1, -1, 2, -2, 3), 7, 8) == 6
    assert found(store, (1, -1, -1, 2, -2, 3), 7, 9) == 4
    assert found(store, (1, -1, -1, 2, -2, 3), 8, 8) == 1


def test_what_was_used_least_recently_makes_room() -> None:
    store = PrefixStore(6 * TOKEN_BYTES, is_whole=False)
    for first in (1, 2, 3):
        keep(store, (first, first))
    assert found(store, (1, 5)) == 1
    keep(store, (4, 4))
    assert [found(store, (first,)) for first in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert store.num_evicted == 1
    keep(store, (3,))  # is there already, and counts as used
    keep(store, (5, 5, 5))
    assert [found(store, (first,)) for first in (1, 3, 4, 5)] == [0, 1, 0, 1]
    assert store.num_bytes == 5 * TOKEN_BYTES


def test_what_is_larger_than_all_memory_puts_nothing_out() -> None:
    store = PrefixStore(3 * TOKEN_BYTES, is_whole=False)
    keep(store, (1, 1))
    keep(store, (2, 2, 2, 2))
    assert found(store, (1,)) == 1
    assert found(store, (2,)) == 0


def test_room_is_made_before_a_copy() -> None:
    store = PrefixStore(3 * TOKEN_BYTES, is_whole=False)
    keep(store, (1, 1))
    sizes: list[int] = []

    def save() -> FakeStored:
        sizes.append(store.num_bytes)
        return stored((2, 2))

    store.keep(key((2, 2)), 2 * TOKEN_BYTES, save)
    assert sizes == [0]


def test_a_beginning_of_another_sequence_goes() -> None:
    store = PrefixStore(1000, is_whole=False)
    keep(store, (1, 2))
    keep(store, (1, 2, 3))
    keep(store, (1,))
    assert len(store) == 1
    assert store.num_bytes == 3 * TOKEN_BYTES
    assert store.num_evicted == 0


def test_whole_prompts_are_found_by_their_whole_content() -> None:
    store = PrefixStore(1000, is_whole=True)
    keep(store, (1, 2, 3))
    keep(store, (1, 2))
    assert len(store) == 2
    assert found(store, (1, 2, 3)) == 3
    assert found(store, (1, 2)) == 2
    assert found(store, (1, 2, 3, 4)) == found(store, (1,)) == 0


SEQUENCES = st.lists(st.integers(-1, 2), min_size=1, max_size=6).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(SEQUENCES, st.integers(0, 1), st.booleans()), max_size=25),
    max_tokens=st.integers(0, 20),
    is_whole=st.booleans(),
)
def test_it_finds_what_a_search_through_all_would(
    steps: list[tuple[Tokens, int, bool]], max_tokens: int, is_whole: bool
) -> None:
    store = PrefixStore(max_tokens * TOKEN_BYTES, is_whole=is_whole)
    kept: list[PrefixKey] = []  # the least recently used first
    for tokens, image, is_kept in steps:
        asked = key(tokens, image)
        hits = [one for one in kept if matches(one, asked, is_whole)]
        longest = max((one.common(asked) for one in hits), default=0)
        if not is_kept:
            result = store.find(asked)
            assert (0 if result is None else result[1]) == longest
            if result is not None:
                used = next(one for one in hits if has_tokens(one, result[0]))
                kept.append(kept.pop(position(kept, used)))
            continue
        keep(store, tokens, image)
        kept = after_keeping(kept, asked, max_tokens, is_whole)
        assert store.num_bytes == TOKEN_BYTES * sum(map(len, kept)) <= max_tokens * TOKEN_BYTES
        assert len(store) == len(kept)


def position(kept: list[PrefixKey], one: PrefixKey) -> int:
    return next(index for index, other in enumerate(kept) if other is one)


def has_tokens(one: PrefixKey, tokens: object) -> bool:
    assert isinstance(tokens, FakeStored)
    return [int(value) for value, _ in tokens.items] == [int(token) for token in one.ids]


def matches(one: PrefixKey, asked: PrefixKey, is_whole: bool) -> bool:
    common = one.common(asked)
    return common > 0 and (not is_whole or common == len(one) == len(asked))


def after_keeping(
    kept: list[PrefixKey], new: PrefixKey, max_tokens: int, is_whole: bool
) -> list[PrefixKey]:
    if len(new) > max_tokens:
        return kept
    for index, one in enumerate(kept):
        if one.common(new) == len(new) and (not is_whole or len(one) == len(new)):
            return [*kept[:index], *kept[index + 1 :], one]
    if not is_whole:
        kept = [one for one in kept if one.common(new) < len(one)]
    while sum(map(len, kept)) + len(new) > max_tokens:
        kept = kept[1:]
    return [*kept, new]


@pytest.mark.parametrize("count", [1, 400])
def test_a_look_up_compares_two_sequences_however_many_there_are(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrefixStore(10**9, is_whole=False)
    for index in range(count):
        keep(store, (1, 2, 3, index + 10, 5))
    compared: list[PrefixKey] = []
    original = PrefixKey.common

    def counting(self: PrefixKey, other: PrefixKey) -> int:
        compared.append(other)
        return original(self, other)

    monkeypatch.setattr(PrefixKey, "common", counting)
    assert found(store, (1, 2, 3, 10, 6)) == 4
    assert len(compared) <= 2
