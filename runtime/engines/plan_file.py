"""An engine goes to its file while TensorRT serializes it, so that it is never whole in memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import tensorrt as trt

    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["PlanFile", "plan_writer"]


class PlanFile:
    """The file of one engine.

    Attributes:
        path: of the file.
        size: bytes so far.
        error: why it could not be written; None if it could.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        path.write_bytes(b"")

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> int:
        """Appends a piece of the engine.

        Returns:
            The bytes that were written: none if that failed, which `error` explains.
        """
        try:
            with self.path.open("ab") as stream:
                stream.write(data)
        except OSError as error:  # must not pass through TensorRT
            self.error = error
            return 0
        self._digest.update(data)
        self.size += len(data)
        return len(data)


def plan_writer(bindings: Bindings, file: PlanFile) -> trt.IStreamWriter:
    """What TensorRT hands an engine to, in pieces of at most 64 MiB."""

    class _Writer(bindings.IStreamWriter):  # type: ignore[name-defined,misc]  # at run time
        def __init__(self) -> None:
            bindings.IStreamWriter.__init__(self)

        # pybind11 hands over bytes and their number in one; the stubs tell of C++'s two.
        def write(self, data: bytes) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
            return file.write(data)

    return _Writer()
