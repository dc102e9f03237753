"""Image features by the content of their pictures, so that a picture is encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.errors import VlmportError
from vlmport.runtime.preparation import RequestImage

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.runtime.backends.base import ImageFeatures
    from vlmport.runtime.preprocessing.prepared import ImageLayout

__all__ = ["EncodedImage", "FeatureCache", "FeatureStatistics"]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """All that a prompt needs of a picture.

    Attributes:
        layout: how it lies in the prompt.
        size: (height, width) of the picture before preprocessing, in pixels.
        features: its embeddings, wherever the backend keeps them.
        num_bytes: memory that they take.
    """

    layout: ImageLayout
    size: tuple[int, int]
    features: ImageFeatures
    num_bytes: int

    def for_request(self) -> RequestImage:
        """The picture as one of a request's."""
        return RequestImage(self.layout, self.size, lambda: self.features)


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """What a cache holds and has done.

    Attributes:
        hits: pictures that were there, or that another thread was encoding.
        misses: pictures that were encoded.
        num_bytes: memory of those that are there.
    """

    hits: int
    misses: int
    num_bytes: int


class FeatureCache:
    """Encoded pictures; those that were used least recently make room for others.

    Threads may share it. Of several that ask for the same new picture at once, one encodes it and
    the others wait for that.

    Args:
        max_bytes: memory that the stored features take at most; 0 stores none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, EncodedImage] = OrderedDict()  # the last used one last
        self._pending: dict[bytes, Future[EncodedImage]] = {}
        self._num_bytes = self._hits = self._misses = 0

    def find(self, digest: bytes) -> EncodedImage | None:
        """A picture that is there, which counts as used; None if it has to be encoded."""
        with self._lock:
            return self._stored(digest)

    def get(self, digest: bytes, encode: Callable[[], EncodedImage]) -> EncodedImage:
        """Gives an encoded picture.

        Args:
            digest: of the picture's content.
            encode: encodes it; not called if that is done, or being done. What it raises reaches
                all who wait for it; nothing is stored then, so that the next one tries again.
        """
        with self._lock:
            stored = self._stored(digest)
            if stored is not None:
                return stored
            pending = self._pending.get(digest)
            is_first = pending is None
            self._misses += is_first
            self._hits += not is_first
            if pending is None:
                pending = self._pending[digest] = Future[EncodedImage]()
        return self._encoded(digest, encode, pending) if is_first else pending.result()

    def statistics(self) -> FeatureStatistics:
        """What the cache holds and has done."""
        with self._lock:
            return FeatureStatistics(self._hits, self._misses, self._num_bytes)

    def _stored(self, digest: bytes) -> EncodedImage | None:
        stored = self._entries.get(digest)
        if stored is not None:
            self._hits += 1
            self._entries.move_to_end(digest)
        return stored

    def _encoded(
        self, digest: bytes, encode: Callable[[], EncodedImage], mine: Future[EncodedImage]
    ) -> EncodedImage:
        try:
            image = encode()
        except BaseException as error:
            with self._lock:
                del self._pending[digest]
            is_ours = not isinstance(error, Exception)  # an interrupt is meant for this thread
            others = "image: the thread that encoded it was interrupted; ask again"
            mine.set_exception(VlmportError(others) if is_ours else error)
            raise
        with self._lock:
            del self._pending[digest]
            self._keep(digest, image)
        mine.set_result(image)
        return image

    def _keep(self, digest: bytes, image: EncodedImage) -> None:
        if image.num_bytes > self._max_bytes:
            return
        self._entries[digest] = image
        self._num_bytes += image.num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
