"""The models of a repository: which there are, and the parameters that they read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import vlmport
from vlmport.runtime.triton.answer_model import answer_config
from vlmport.runtime.triton.first_request import first_requests
from vlmport.runtime.triton.graph_models import (
    features_config,
    graph_config,
    preprocess_config,
    served_graphs,
)

if TYPE_CHECKING:
    from vlmport.contract import Manifest
    from vlmport.runtime.serving.options import ServingOptions
    from vlmport.runtime.triton.model_config import ModelConfig
    from vlmport.runtime.triton.names import ModelNames

__all__ = ["Layout", "model_configs"]

_Parameters = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a repository is laid out.

    Attributes:
        names: of the models.
        backend: what runs the image graphs.
        is_on_gpu: whether graphs run on a GPU.
        instances: copies of each model but the main one.
        serving: limits of the main model.
    """

    names: ModelNames
    backend: Literal["python", "onnxruntime", "tensorrt"]
    is_on_gpu: bool
    instances: int
    serving: ServingOptions

    @property
    def runtime_backend(self) -> str:
        """What runs the graphs of Python models, by vlmport's names."""
        if self.backend == "tensorrt":
            return "tensorrt"
        return "onnxruntime-cuda" if self.is_on_gpu else "onnxruntime"

    def calls_image_models(self, manifest: Manifest) -> bool:
        """Whether the main model asks Triton's image models, and does not run the graphs itself.

        Tensors reach a Python model by numpy, which has no bfloat16.
        """
        return self.backend != "python" and manifest.precision != "bfloat16"

    def own_graphs(self, manifest: Manifest) -> tuple[str, ...]:
        """The graphs whose files lie with the main model."""
        graphs = [graph.name for graph in manifest.graphs]
        if self.calls_image_models(manifest):
            graphs = [graph for graph in graphs if graph not in manifest.image_graphs]
        return tuple(graphs)


def model_configs(manifest: Manifest, layout: Layout) -> list[ModelConfig]:
    """Every model, the main one first.

    Args:
        manifest: of the bundle.
        layout: of the repository.
    """
    names, graphs = layout.names, served_graphs(manifest)
    max_batch = layout.serving.num_slots
    requests = first_requests(manifest, graphs, max_batch)
    home = f"../../{names.main}/1"
    common = (("bundle", f"{home}/bundle"), ("vlmport", vlmport.__version__))
    is_python = layout.backend == "python"
    run = (("runtime_backend", layout.runtime_backend),)
    models = [
        graph_config(
            manifest,
            graph,
            layout.backend,
            names,
            max_batch=max_batch,
            instances=layout.instances,
            is_on_gpu=layout.is_on_gpu,
            parameters=(*common, ("graph", graph), *run) if is_python else (),
            warmup=requests[graph],
        )
        for graph in graphs
    ]
    return [
        answer_config(names, _main_parameters(manifest, layout), is_on_gpu=layout.is_on_gpu),
        *models,
        preprocess_config(manifest, names, layout.instances, common),
        features_config(manifest, names),
    ]


def _main_parameters(manifest: Manifest, layout: Layout) -> _Parameters:
    serving = layout.serving
    parameters = {
        "bundle": "bundle",
        "vlmport": vlmport.__version__,
        "runtime_backend": layout.runtime_backend,
        "image_graphs": "bls" if layout.calls_image_models(manifest) else "in_process",
        "models": json.dumps({graph: layout.names.of(graph) for graph in manifest.image_graphs}),
        "num_slots": str(serving.num_slots),
        "max_queue": str(serving.max_queue),
        "prefix_bytes": str(serving.prefix_bytes),
        "feature_bytes": str(serving.feature_bytes),
    }
    # What is left out follows from the bundle and the machine.
    for key in ("cache_tokens", "prefill_tokens"):
        if (value := getattr(serving, key)) is not None:
            parameters[key] = str(value)
    if layout.backend == "tensorrt":
        parameters["engines"] = "engines"
    return tuple(parameters.items())
