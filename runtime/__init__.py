"""Stage 4: runs a bundle with numpy and ONNX Runtime; needs neither torch nor transformers."""

from __future__ import annotations

from vlmport.runtime.model import VisionLanguageModel
from vlmport.runtime.regions import Box, Region
from vlmport.runtime.request import GenerationResult, Piece, Request
from vlmport.runtime.sampling import SamplingOptions

__all__ = [
    "Box",
    "GenerationResult",
    "Piece",
    "Region",
    "Request",
    "SamplingOptions",
    "VisionLanguageModel",
]
