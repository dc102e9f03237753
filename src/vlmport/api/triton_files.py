"""The files of a model repository."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import vlmport
from vlmport.api.triton_texts import root_files
from vlmport.contract import MANIFEST_NAME
from vlmport.runtime.triton.config_text import MODEL_FILES, config_text
from vlmport.runtime.triton.names import PREPROCESS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from vlmport.api.triton_models import Layout
    from vlmport.contract import Manifest
    from vlmport.runtime.triton.model_config import ModelConfig

__all__ = ["copy_bundle", "copy_graph", "graph_files", "write_model", "write_root_files"]

_MODEL = '''"""The Triton model {name}; written by vlmport {version}."""

import sys
from pathlib import Path

# The models of a repository share one copy of the package, which lies with the main model.
HOME = Path(__file__).absolute().{home}
if not (HOME / "vlmport").is_dir():
    raise ImportError(
        f"{{HOME}}: found no package vlmport; expected the one of the model {main} beside this "
        "model; load both from one repository in a file system (a cloud store hands models over "
        "one by one: copy the repository to a disk first)"
    )
sys.path.insert(0, str(HOME))

from vlmport.runtime.triton_model.{module} import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''


def graph_files(manifest: Manifest, graph: str) -> tuple[str, ...]:
    """Paths of a graph and of its weights, which lie beside it under its name and a suffix."""
    path = manifest.graph(graph).file
    return tuple(
        entry.path
        for entry in manifest.files
        if entry.path == path or entry.path.startswith(f"{path}.")
    )


def copy_bundle(bundle: Path, manifest: Manifest, target: Path, graphs: Collection[str]) -> None:
    """Copies a bundle without the graphs that the main model does not run itself.

    Args:
        bundle: its files were verified.
        manifest: of the bundle.
        target: folder, which is made.
        graphs: names of those that it runs.
    """
    others = {
        path
        for graph in manifest.graphs
        if graph.name not in graphs
        for path in graph_files(manifest, graph.name)
    }
    for path in (MANIFEST_NAME, *(entry.path for entry in manifest.files)):
        if path not in others:
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / path, place)


def copy_graph(bundle: Path, manifest: Manifest, graph: str, target: Path) -> None:
    """Copies a graph as model.onnx; its weights keep the names by which it refers to them.

    Triton opens the file by its path, so that ONNX Runtime finds the weights beside it.

    Args:
        bundle: its files were verified.
        manifest: of the bundle.
        graph: its name.
        target: an existing folder.
    """
    first = manifest.graph(graph).file
    for path in graph_files(manifest, graph):
        name = MODEL_FILES["onnxruntime"] if path == first else path.rpartition("/")[2]
        shutil.copyfile(bundle / path, target / name)


def write_model(repository: Path, config: ModelConfig, layout: Layout) -> None:
    """Writes config.pbtxt, the first request's content, and model.py of a Python model."""
    folder = repository / config.name
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config_text(config), encoding="utf-8")
    for entry in config.warmup:
        if entry.content:
            (folder / "warmup").mkdir(exist_ok=True)
            (folder / "warmup" / entry.tensor.name).write_bytes(entry.content)
    if config.platform == "python":
        (version / MODEL_FILES["python"]).write_text(_model(config, layout), encoding="utf-8")
    if config.platform == "ensemble":
        # Triton wants the folder of a version, and what copies a repository may drop an empty one.
        (version / "ensemble").write_text("config.pbtxt says it all\n", encoding="utf-8")


def _model(config: ModelConfig, layout: Layout) -> str:
    main = layout.names.main
    home, module = f'parents[2] / "{main}" / "1"', "graph"
    if config.name == main:
        home, module = "parent", "answer"
    elif config.name == layout.names.of(PREPROCESS):
        module = "preprocess"
    return _MODEL.format(
        name=config.name, version=vlmport.__version__, main=main, home=home, module=module
    )


def write_root_files(
    repository: Path, manifest: Manifest, layout: Layout, configs: Sequence[ModelConfig]
) -> None:
    """Writes what lies beside the models: README, requirements, Dockerfile, build step."""
    for name, (text, is_program) in root_files(manifest, layout, configs).items():
        path = repository / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755 if is_program else 0o644)
