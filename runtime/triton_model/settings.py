"""What config.pbtxt tells a model about itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmport.errors import InputError, close_matches
from vlmport.runtime.serving.options import ServingOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ModelSettings", "read_settings"]

_IMAGE_GRAPHS = ("in_process", "bls")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Parameters of a model's configuration.

    Attributes:
        name: of the model.
        version: of the model.
        max_batch_size: 0 if Triton's shapes have no batch axis of their own.
        bundle: folder of the bundle.
        runtime_backend: what runs the graphs, by vlmport's names.
        engines: folder of TensorRT engines, or None.
        threads: of ONNX Runtime; None for the cores that the process may use.
        calls_image_models: whether image graphs run in Triton models of their own ("bls").
        models: image graph -> name of its model.
        graph: of a model that runs one graph; "" of others.
        serving: limits of the service.
    """

    name: str
    version: str
    max_batch_size: int
    bundle: Path
    runtime_backend: str
    engines: Path | None
    threads: int | None
    calls_image_models: bool
    models: Mapping[str, str]
    graph: str
    serving: ServingOptions


def read_settings(args: Mapping[str, str]) -> ModelSettings:
    """Reads what Triton passes to `initialize`.

    Args:
        args: "model_config" is JSON; "model_repository" is the model's folder.

    Raises:
        InputError: if a parameter cannot be used.
    """
    config: dict[str, Any] = json.loads(args["model_config"])
    values = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    version = Path(args["model_repository"]) / args["model_version"]
    image_graphs = values.get("image_graphs", _IMAGE_GRAPHS[0])
    if image_graphs not in _IMAGE_GRAPHS:
        msg = f"image_graphs: found {image_graphs!r}; {close_matches(image_graphs, _IMAGE_GRAPHS)}"
        raise InputError(msg)
    limits = {
        field.name: _whole_number(field.name, values[field.name])
        for field in fields(ServingOptions)
        if field.name in values
    }
    return ModelSettings(
        name=args["model_name"],
        version=args["model_version"],
        max_batch_size=int(config.get("max_batch_size", 0)),
        bundle=version / values.get("bundle", "bundle"),
        runtime_backend=values.get("runtime_backend", "onnxruntime"),
        engines=version / values["engines"] if "engines" in values else None,
        threads=_whole_number("threads", values["threads"]) if "threads" in values else None,
        calls_image_models=image_graphs == "bls",
        models=json.loads(values.get("models", "{}")),
        graph=values.get("graph", ""),
        serving=ServingOptions(**limits),
    )


def _whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        msg = f"{name}: found {text!r} in config.pbtxt; expected a whole number"
        raise InputError(msg) from error
