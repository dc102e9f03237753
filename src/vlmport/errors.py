"""The errors that vlmport raises for what a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "CalibrationError",
    "CancelledError",
    "CheckpointError",
    "DeadlineError",
    "EngineError",
    "ExportError",
    "GraphError",
    "InputError",
    "ParityError",
    "QueueFullError",
    "ServerError",
    "VlmportError",
    "close_matches",
]


class VlmportError(Exception):
    """Base of all errors with a message for the user.

    The message reads: subject: what was found; what was expected or is available; what to do.
    The command line prints it without a traceback and exits with code 1.
    """


class CheckpointError(VlmportError):
    """A checkpoint is missing, damaged, or of a kind that is not known."""


class ExportError(VlmportError):
    """A readable checkpoint cannot be turned into a bundle."""


class GraphError(VlmportError):
    """A graph is not of the form that a pass or a backend needs."""


class BundleError(VlmportError):
    """A bundle is missing, damaged, newer than this vlmport, or unsafe to open."""


class InputError(VlmportError):
    """An image, a prompt or an option of a request cannot be used."""


class CalibrationError(VlmportError):
    """Calibration data, a recipe or a bundle does not allow what quantization asks for."""


class EngineError(VlmportError):
    """A TensorRT engine cannot be built, opened or run with what was asked of it."""


class ParityError(VlmportError):
    """A bundle and a checkpoint cannot be compared."""


class QueueFullError(VlmportError):
    """A service has as many waiting requests as it takes; the same request may be asked later."""


class DeadlineError(VlmportError):
    """A request was not answered within the time that it was given."""


class CancelledError(VlmportError):
    """A request was taken back before its answer was complete."""


class ServerError(VlmportError):
    """A server cannot be reached, or refuses or does not complete a request.

    Args:
        message: for the user.
        kind: what went wrong in one word, for counting: a status of gRPC as "UNAVAILABLE" or
            "INVALID_ARGUMENT", a status of HTTP as "HTTP_400", "TIMEOUT" if the client waited no
            longer.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def close_matches(name: str, known: Iterable[str]) -> str:
    """Words for the end of an "unknown name" message: the nearest known names, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}? known: {', '.join(names)}"
    return f"known: {', '.join(names)}"
