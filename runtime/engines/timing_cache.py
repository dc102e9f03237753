"""Measurements of kernels that one build leaves to the next; the full TensorRT alone has them."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from vlmport.errors import EngineError
from vlmport.runtime.engines.shapes import memory

if TYPE_CHECKING:
    from pathlib import Path

    import tensorrt as trt

__all__ = ["IGNORED", "TimingCache"]

IGNORED = "TensorRT-RTX measures no kernels when it builds, so that it uses no timing cache"


class TimingCache:
    """A file with measurements, which builds read and add to; safe for builds in threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def use(self, config: trt.IBuilderConfig) -> None:
        """Gives a build what is known so far.

        Raises:
            EngineError: if the file is there and cannot be used, or its folder is missing.
        """
        if not self._path.parent.is_dir():  # else told by `keep`, when a build has taken minutes
            msg = f"{self._path}: no such folder {self._path.parent}; make it first"
            raise EngineError(msg)
        with self._lock:
            try:
                content = self._path.read_bytes() if self._path.exists() else b""
            except OSError as error:
                msg = f"{self._path}: cannot be read ({error.strerror}); choose another file"
                raise EngineError(msg) from error
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            msg = (
                f"{self._path}: is no timing cache of this TensorRT and GPU; delete it or choose "
                "another file"
            )
            raise EngineError(msg)

    def keep(self, config: trt.IBuilderConfig) -> None:
        """Adds what a build measured to the file, in one step.

        Raises:
            EngineError: if the file cannot be written.
        """
        with self._lock:
            cache = config.get_timing_cache()
            if self._path.exists():
                with contextlib.suppress(OSError):
                    written = config.create_timing_cache(self._path.read_bytes())
                    cache.combine(written, True)
            temporary = self._path.with_name(f".{self._path.name}.new")
            try:
                temporary.write_bytes(memory(cache.serialize()))
                temporary.replace(self._path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                msg = f"{self._path}: cannot be written ({error.strerror}); choose another file"
                raise EngineError(msg) from error
