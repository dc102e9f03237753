"""Stage 4: runs a bundle with numpy and ONNX Runtime; needs neither torch nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.runtime.model import VisionLanguageModel
from vlmport.runtime.regions import Box, Region
from vlmport.runtime.request import GenerationResult, Piece, Request
from vlmport.runtime.sampling import SamplingOptions
from vlmport.runtime.serving.options import ServingOptions

if TYPE_CHECKING:
    from vlmport.runtime.serving.service import GenerationService

__all__ = [
    "Box",
    "GenerationResult",
    "GenerationService",
    "Piece",
    "Region",
    "Request",
    "SamplingOptions",
    "ServingOptions",
    "VisionLanguageModel",
]


def __getattr__(name: str) -> object:
    """Imports the service when it is asked for: asyncio takes a tenth of the runtime's import."""
    if name == "GenerationService":
        from vlmport.runtime.serving.service import GenerationService

        return GenerationService
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
