"""Model repositories of the trained bundles, and their configurations as Triton's protobuf."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format  # type: ignore[import-untyped]
from support.trained import exported
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import np_to_triton_dtype

from vlmport.api.progress import SilentProgress
from vlmport.api.triton import TritonOptions, write_repository

__all__ = [
    "BACKENDS",
    "CHECKPOINTS",
    "config_of",
    "configs_of",
    "dims_of",
    "graph_ports",
    "repository",
    "type_of",
    "written",
]

CHECKPOINTS = ("tinyllava", "paligemma", "idefics2", "fuyu")
BACKENDS = ("python", "onnxruntime", "tensorrt")

_PROTOBUF: Any = model_config_pb2  # its classes are made when it is imported

Ports = dict[str, tuple[str, tuple[int | str, ...]]]


def written(bundle: Path, folder: Path, backend: str = "python", **options: Any) -> Path:
    """A repository of a bundle."""
    write_repository(TritonOptions(bundle, folder, backend=backend, **options), SilentProgress())
    return folder


@functools.cache
def repository(checkpoint: str, backend: str) -> Path:
    """The repository of a checkpoint; a test that changes it works on a copy."""
    folder = Path(tempfile.mkdtemp(prefix="vlmport-triton-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return written(exported(checkpoint), folder / "repository", backend)


def config_of(model: Path) -> Any:
    """A model's config.pbtxt as Triton's own protobuf reads it; it refuses unknown fields."""
    text = (model / "config.pbtxt").read_text(encoding="utf-8")
    config: Any = text_format.Parse(text, _PROTOBUF.ModelConfig())
    return config


def configs_of(folder: Path) -> dict[str, Any]:
    """Name of a folder -> configuration, of every model."""
    models = sorted(path for path in folder.iterdir() if path.is_dir())
    return {model.name: config_of(model) for model in models}


def type_of(dtype: str) -> int:
    """Number of Triton's data type, by what tritonclient makes of numpy's."""
    name = "BF16" if dtype == "bfloat16" else str(np_to_triton_dtype(np.dtype(dtype)))
    wire = {"BYTES": "STRING"}  # the name of texts in requests -> in configurations
    number: int = _PROTOBUF.DataType.Value(f"TYPE_{wire.get(name, name)}")
    return number


def dims_of(shape: tuple[int | str, ...], max_batch_size: int) -> list[int]:
    """What config.pbtxt must say of a shape."""
    lengths = [axis if isinstance(axis, int) else -1 for axis in shape]
    if max_batch_size:
        assert lengths[0] == -1
        return lengths[1:]
    return lengths


def graph_ports(path: Path) -> tuple[Ports, Ports]:
    """Inputs and outputs of an ONNX file: name -> (numpy's name of the type, shape)."""
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [port for port in graph.input if port.name not in weights]
    return _ports(inputs), _ports(graph.output)


def _ports(ports: Any) -> Ports:
    found: Ports = {}
    for port in ports:
        tensor = port.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
        found[port.name] = (dtype, shape)
    return found
