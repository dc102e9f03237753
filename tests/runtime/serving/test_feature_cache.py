from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vlmport.errors import InputError, VlmportError
from vlmport.runtime.host_prompt import HostRows
from vlmport.runtime.preprocessing.prepared import ImageLayout
from vlmport.runtime.serving.feature_cache import EncodedImage, FeatureCache, FeatureStatistics


def image(num_bytes: int) -> EncodedImage:
    features = HostRows(np.zeros((num_bytes // 4, 1), np.float32))
    return EncodedImage(ImageLayout(1, 0, 0), (3, 4), features, num_bytes)


def never() -> EncodedImage:
    raise AssertionError("encoded again")


def test_a_picture_is_encoded_once() -> None:
    cache = FeatureCache(100)
    first = cache.get(b"a", lambda: image(40))
    assert cache.get(b"a", never) is first
    assert cache.statistics() == FeatureStatistics(hits=1, misses=1, num_bytes=40)


def test_the_least_recently_used_make_room() -> None:
    cache = FeatureCache(100)
    kept = cache.get(b"a", lambda: image(40))
    cache.get(b"b", lambda: image(40))
    cache.get(b"a", never)
    cache.get(b"c", lambda: image(60))
    assert cache.get(b"a", never) is kept
    assert cache.statistics().num_bytes == 100
    cache.get(b"b", lambda: image(100))
    assert cache.statistics() == FeatureStatistics(hits=2, misses=4, num_bytes=100)


@pytest.mark.parametrize("max_bytes", [0, 39])
def test_what_is_larger_than_all_memory_is_not_stored(max_bytes: int) -> None:
    cache = FeatureCache(max_bytes)
    first = cache.get(b"a", lambda: image(40))
    assert cache.get(b"a", lambda: image(40)) is not first
    assert cache.statistics() == FeatureStatistics(hits=0, misses=2, num_bytes=0)


class Waiting:
    """Several threads that ask for one picture, which the first encodes when it may."""

    def __init__(self, cache: FeatureCache, error: BaseException | None = None) -> None:
        self._cache = cache
        self._error = error
        self._begun, self._may_end = threading.Event(), threading.Event()
        self.encoded = 0

    def ask(self, threads: int) -> list[EncodedImage | BaseException]:
        with ThreadPoolExecutor(threads) as pool:
            first = pool.submit(self._cache.get, b"a", self._encode)
            assert self._begun.wait(20)
            others = [pool.submit(self._cache.get, b"a", never) for _ in range(threads - 1)]
            while self._cache.statistics().hits < threads - 1:
                time.sleep(0.001)
            self._may_end.set()
            asked = (first, *others)
            return [one.exception(20) or one.result() for one in asked]

    def _encode(self) -> EncodedImage:
        self.encoded += 1
        self._begun.set()
        assert self._may_end.wait(20)
        if self._error is not None:
            raise self._error
        return image(40)


def test_threads_wait_for_the_one_that_encodes() -> None:
    waiting = Waiting(FeatureCache(100))
    found = waiting.ask(8)
    assert isinstance(found[0], EncodedImage)
    assert all(one is found[0] for one in found)
    assert waiting.encoded == 1


def test_an_error_reaches_all_and_is_not_stored() -> None:
    cache = FeatureCache(100)
    error = InputError("image: damaged")
    assert Waiting(cache, error).ask(3) == [error] * 3
    assert cache.get(b"a", lambda: image(40)).num_bytes == 40


def test_an_interrupt_is_for_the_thread_that_it_reached() -> None:
    first, second = Waiting(FeatureCache(100), KeyboardInterrupt()).ask(2)
    assert isinstance(first, KeyboardInterrupt)
    assert isinstance(second, VlmportError)
    assert "interrupted; ask again" in str(second)


def test_threads_that_fill_and_read_keep_the_bound() -> None:
    cache = FeatureCache(1000)

    def ask(number: int) -> int:
        digest = bytes([number * 7 % 31])
        size = 40 + 4 * (number * 7 % 31)
        return cache.get(digest, lambda: image(size)).num_bytes - size

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(2000))) == {0}
    found = cache.statistics()
    assert found.hits + found.misses == 2000
    assert 0 < found.num_bytes <= 1000
