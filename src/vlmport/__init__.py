"""vlmport: export vision-language models to ONNX and run them exactly as PyTorch does."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
