"""What a repository carries so that TensorRT's engines can be built where they will run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.api.triton_models import Layout
    from vlmport.contract import Manifest

__all__ = ["write_engine_step"]


def write_engine_step(bundle: Path, manifest: Manifest, layout: Layout, repository: Path) -> None:
    """Placeholder until the next commit."""
