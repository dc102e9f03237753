"""Keys and values of sequences that have ended, for prompts that begin as they do."""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.runtime.backends.base import StoredTokens
    from vlmport.runtime.serving.prefix_key import PrefixKey

__all__ = ["PrefixStore"]


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A stored sequence: all tokens of the key are in `tokens`."""

    key: PrefixKey
    tokens: StoredTokens


class PrefixStore:
    """Sequences by content; those that were used least recently make room for others.

    No sequence is kept that another one begins with, unless prompts are only found whole.

    Args:
        max_bytes: memory that they take together at most; 0 keeps none.
        is_whole: whether a prompt is found by its whole content alone, as its tokens all see each
            other: keys and values of a shared beginning would depend on what follows.

    Attributes:
        num_bytes: memory that they take.
        num_evicted: sequences that had to make room.
    """

    def __init__(self, max_bytes: int, *, is_whole: bool) -> None:
        self._max_bytes = max_bytes
        self._is_whole = is_whole
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the last used one last
        # Sorted, the sequence with the longest common beginning is a neighbour, so that a look-up
        # costs the same however many there are.
        self._contents: list[bytes] = []
        self.num_bytes = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        """Sequences."""
        return len(self._entries)

    def find(self, key: PrefixKey, longer_than: int = 0) -> tuple[StoredTokens, int] | None:
        """Looks for the sequence that has the most leading tokens in common with a prompt.

        Args:
            key: the prompt.
            longer_than: tokens that are to be had without it.

        Returns:
            Its keys and values, and how many of its tokens are the prompt's, which are more than
            those; None if there is none. What is found counts as used.
        """
        content = _content(key)
        position = bisect.bisect_left(self._contents, content)
        best, length = None, longer_than
        for neighbour in self._contents[max(0, position - 1) : position + 1]:
            common = self._entries[neighbour].key.common(key)
            is_whole = len(neighbour) == len(content) and common == len(key)
            if common > length and (is_whole or not self._is_whole):
                best, length = neighbour, common
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best].tokens, length

    def keep(self, key: PrefixKey, num_bytes: int, save: Callable[[], StoredTokens]) -> None:
        """Stores a sequence, unless it is there or larger than all memory.

        Args:
            key: its tokens.
            num_bytes: memory that it will take, for which room is made before it is copied.
            save: copies it out of the cache; called only if it is to be stored.
        """
        if num_bytes > self._max_bytes:
            return
        content = _content(key)
        covering = self._covering(content)
        if covering is not None:
            self._entries.move_to_end(covering)
            return
        self._drop_beginning(content)
        self._make_room(num_bytes)
        tokens = save()
        self._entries[content] = _Entry(key, tokens)
        bisect.insort(self._contents, content)
        self.num_bytes += tokens.num_bytes
        self._make_room(0)

    def _covering(self, content: bytes) -> bytes | None:
        """The content of a sequence that this one is, or is the beginning of."""
        position = bisect.bisect_left(self._contents, content)
        if position == len(self._contents):
            return None
        following = self._contents[position]
        is_covered = following == content if self._is_whole else following.startswith(content)
        return following if is_covered else None

    def _drop_beginning(self, content: bytes) -> None:
        """Drops the sequence that this one goes on from; there is one at most, as none begins so.

        What lies between it and this one in the order begins with it, too, so it is next to it.
        """
        position = bisect.bisect_left(self._contents, content)
        if position and not self._is_whole:
            preceding = self._contents[position - 1]
            if content.startswith(preceding):
                self._drop(preceding)

    def _make_room(self, num_bytes: int) -> None:
        while self._entries and self.num_bytes + num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
            self.num_evicted += 1

    def _drop(self, content: bytes) -> None:
        self.num_bytes -= self._entries.pop(content).tokens.num_bytes
        del self._contents[bisect.bisect_left(self._contents, content)]


def _content(key: PrefixKey) -> bytes:
    """Eight bytes for each token, those of an image's places from its digest.

    Two keys have the same leading bytes where they have the same leading tokens.
    """
    ids = key.ids.copy()
    for number, image in enumerate(key.images):
        digest = hashlib.blake2b(image, digest_size=8).digest()
        # Negative, so that no image is taken for a token.
        ids[key.ids == -1 - number] = -1 - (int.from_bytes(digest, "big") >> 1)
    return ids.astype(np.dtype(">i8")).tobytes()
