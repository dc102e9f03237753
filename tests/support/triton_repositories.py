"""Repositories of Python models for a real server."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING

from vlmport.api.progress import SilentProgress
from vlmport.api.triton import TritonOptions, write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["bls_twin", "endless_bundle", "python_repository", "set_parameters"]


def python_repository(
    bundle: Path, repository: Path, name: str, parameters: Mapping[str, object], slots: int = 8
) -> Path:
    """What `vlmport triton --backend python` writes, with parameters of the main model changed."""
    options = TritonOptions(
        bundle, repository, backend="python", name=name, max_batch=slots, overwrite=True
    )
    write_repository(options, SilentProgress())
    set_parameters(repository / name / "config.pbtxt", parameters)
    return repository


def bls_twin(repository: Path, name: str, target: Path) -> Path:
    """A repository with a copy of the main model that asks the image models of `repository`.

    Its bundle has no image graphs, so that it cannot run them itself.
    """
    twin = f"{name}_bls"
    shutil.copytree(repository / name, target / twin)
    for graph in ("vision_encoder", "projector"):
        for file in (target / twin / "1" / "bundle").glob(f"{graph}.onnx*"):
            file.unlink()
    config = target / twin / "config.pbtxt"
    config.write_text(config.read_text().replace(f'name: "{name}"', f'name: "{twin}"', 1))
    set_parameters(config, {"image_graphs": "bls"})
    return target


def endless_bundle(bundle: Path, target: Path) -> Path:
    """A copy whose answers end at max_tokens alone: tokens that end an answer are never chosen."""
    shutil.copytree(bundle, target)
    path = target / "manifest.json"
    manifest = json.loads(path.read_text())
    ends = manifest["special_tokens"]["eos_token_ids"]
    suppressed = manifest["generation"]["suppressed_token_ids"]
    manifest["generation"]["suppressed_token_ids"] = sorted({*suppressed, *ends})
    path.write_text(json.dumps(manifest))
    return target


def set_parameters(config: Path, parameters: Mapping[str, object]) -> None:
    """Changes or adds parameters of a config.pbtxt."""
    text = config.read_text()
    for key, value in parameters.items():
        entry = f'parameters {{\n  key: "{key}"\n  value {{ string_value: "{value}" }}\n}}\n'
        pattern = rf'parameters {{\n  key: "{key}"\n  value {{.*}}\n}}\n'
        text, found = re.subn(pattern, entry.replace("\\", r"\\"), text)
        text += "" if found else entry
    config.write_text(text)
