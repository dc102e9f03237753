"""The backends that a user can choose; importing this loads nothing, so that --help stays fast."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "BackendName"]

BackendName = Literal[
    "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt-rtx", "tensorrt", "tensorrt-rtx"
]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
DEFAULT_BACKEND: BackendName = "onnxruntime"
