from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmport.errors import EngineError
from vlmport.runtime.engines.timing_cache import TimingCache


class Cache:
    """Measurements as bytes, joined by adding those that are missing."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        self.content = bytes(sorted(set(self.content) | set(other.content)))
        return ignore_mismatch

    def serialize(self) -> bytes:
        return self.content


class Config:
    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content == b"damaged" else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def config() -> Any:
    return Config()


def test_a_build_adds_to_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"ab")
    first, second, cache = config(), config(), TimingCache(path)
    cache.use(first)
    cache.use(second)
    assert first.cache.content == b"ab"
    first.cache.content, second.cache.content = b"abc", b"abd"
    cache.keep(first)
    cache.keep(second)
    assert path.read_bytes() == b"abcd"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_begins_empty(tmp_path: Path) -> None:
    found = config()
    TimingCache(tmp_path / "cache").use(found)
    assert found.cache.content == b""


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"is no timing cache of this TensorRT.*delete it"):
        TimingCache(path).use(config())


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be read \(Is a directory\)"):
        TimingCache(tmp_path).use(config())


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    found, cache = config(), TimingCache(tmp_path / "folder" / "cache")
    (tmp_path / "folder").mkdir()
    cache.use(found)
    (tmp_path / "folder").rmdir()
    with pytest.raises(EngineError, match=r"cannot be written \(No such file"):
        cache.keep(found)


def test_a_missing_folder_is_told_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no such folder .*missing; make it first"):
        TimingCache(tmp_path / "missing" / "cache").use(config())
