"""What lies beside the models of a repository, for people and for a container."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.api.triton_readme import readme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.triton_models import Layout
    from vlmport.contract import Manifest
    from vlmport.runtime.triton.model_config import ModelConfig

__all__ = ["requirements", "root_files"]

_COMMON = (
    # The package takes 2.x, too; the vendor's container is made with "numpy<2" (build.py of
    # triton-inference-server/server, 2.73), and an older Python backend hands 2.x wrong arrays.
    "numpy>=1.26,<2",
    "pillow>=12,<14",
    "tokenizers>=0.22,<0.24",
    "jinja2>=3.1.6,<4",
    "pydantic>=2.12,<3",
)
_OF_BACKEND = {
    "onnxruntime": ("onnxruntime>=1.31,<1.32",),
    "onnxruntime-cuda": (
        "onnxruntime-gpu[cuda,cudnn]>=1.31,<1.32",
        "cuda-bindings>=13,<14",
        "ml_dtypes>=0.5,<0.7",
    ),
    "tensorrt": ("cuda-bindings>=13,<14", "ml_dtypes>=0.5,<0.7"),
}
_DOCKERFILE = """\
ARG TAG=26.09-py3
FROM nvcr.io/nvidia/tritonserver:${TAG}
COPY requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir -r /tmp/requirements.txt
"""
_DOCKERFILE_TENSORRT = """\
# The version of the container's own TensorRT, without which engines do not load.
ARG TENSORRT
RUN pip install --no-cache-dir "tensorrt==${TENSORRT:?say --build-arg TENSORRT=11.4.0}.*"
"""
_SHELL = """\
#!/usr/bin/env bash
# Builds the TensorRT engines where they will run; does nothing if they are there. See --help.
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/build_engines.py" "$@"
"""
_PROGRAM = '''\
"""Builds the TensorRT engines of this repository; build_engines.sh calls it."""

import sys
from pathlib import Path

HOME = Path(__file__).absolute().parent / "{main}" / "1"
sys.path.insert(0, str(HOME))

from vlmport.runtime.triton_build.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(HOME))
'''


def root_files(
    manifest: Manifest, layout: Layout, configs: Sequence[ModelConfig]
) -> dict[str, tuple[str, bool]]:
    """Name -> (content, whether it is a program)."""
    is_built = layout.backend == "tensorrt"
    texts = {
        "README.md": (readme(manifest, layout, configs), False),
        "requirements.txt": ("\n".join(requirements(layout)) + "\n", False),
        "Dockerfile": (_DOCKERFILE + (_DOCKERFILE_TENSORRT if is_built else ""), False),
    }
    if is_built:
        texts["build_engines.sh"] = (_SHELL, True)
        texts["build_engines.py"] = (_PROGRAM.format(main=layout.names.main), False)
    return texts


def requirements(layout: Layout) -> tuple[str, ...]:
    """Python packages that the models import; those of pyproject.toml but for a smaller numpy."""
    return (*_COMMON, *_OF_BACKEND[layout.runtime_backend])
