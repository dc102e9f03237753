"""Stage 4: runs a bundle with numpy and ONNX Runtime; needs neither torch nor transformers."""

from __future__ import annotations

from vlmport.runtime.model import VisionLanguageModel
from vlmport.runtime.regions import Box, Region
from vlmport.runtime.request import GenerationResult, Piece, Request
from vlmport.runtime.sampling import SamplingOptions
from vlmport.runtime.serving.options import ServingOptions
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
