"""What lies beside the models of a repository, for people and for a container."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import vlmport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.triton_models import Layout
    from vlmport.contract import Manifest
    from vlmport.runtime.triton.model_config import ModelConfig

__all__ = ["root_files"]


def root_files(
    manifest: Manifest, layout: Layout, configs: Sequence[ModelConfig]
) -> dict[str, tuple[str, bool]]:
    """Name -> (content, whether it is a program)."""
    return {"README.md": (f"# {layout.names.main}\n", False)}
