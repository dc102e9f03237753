"""Which models a bundle's graphs become, and what Triton is told of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.runtime.engines.profiles import tiles_of_an_image
from vlmport.runtime.triton.model_config import (
    EnsembleStep,
    ModelConfig,
    TritonTensor,
)
from vlmport.runtime.triton.names import FEATURES, PREPROCESS

if TYPE_CHECKING:
    from vlmport.contract import GraphSpec, Manifest, TensorSpec
    from vlmport.runtime.triton.model_config import Platform, WarmupInput
    from vlmport.runtime.triton.names import ModelNames

__all__ = [
    "IMAGE",
    "features_config",
    "graph_batch",
    "graph_config",
    "preprocess_config",
    "served_graphs",
    "triton_tensor",
]

IMAGE = TritonTensor("image", "TYPE_STRING", (1,))  # the bytes of a picture's file
_EMBEDDING = "embed_tokens"
# Axes that count things which do not depend on each other, so that requests can be joined there.
# The patches of a picture are such, too, but belong to one request: their number is its size.
_BATCH_AXES = ("batch", "num_images", "num_tiles")
_TYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16"}


def served_graphs(manifest: Manifest) -> tuple[str, ...]:
    """The graphs that are models of their own."""
    return (*manifest.image_graphs, _EMBEDDING)


def graph_batch(manifest: Manifest, graph: str, max_batch: int) -> int:
    """The most that Triton puts into one call of a graph; 0 if it must not join requests.

    Args:
        manifest: of the bundle.
        graph: one of `served_graphs`.
        max_batch: what the user asked for; a picture's own tiles fit in any case.
    """
    spec = manifest.graph(graph)
    first = {port.shape[0] if port.shape else 0 for port in (*spec.inputs, *spec.outputs)}
    if len(first) > 1 or not first <= set(_BATCH_AXES):
        return 0
    return max_batch if graph == _EMBEDDING else max(max_batch, tiles_of_an_image(manifest))


def graph_config(
    manifest: Manifest,
    graph: str,
    platform: Platform,
    names: ModelNames,
    *,
    max_batch: int,
    instances: int,
    is_on_gpu: bool,
    parameters: tuple[tuple[str, str], ...],
    warmup: tuple[WarmupInput, ...],
) -> ModelConfig:
    """The model of one graph; its tensors are the graph's.

    Args:
        manifest: of the bundle.
        graph: one of `served_graphs`.
        platform: what runs it.
        names: of the models.
        max_batch: as in `graph_batch`.
        instances: copies.
        is_on_gpu: whether they run on a GPU.
        parameters: of a Python model.
        warmup: inputs of the first request, as whole shapes.
    """
    spec = manifest.graph(graph)
    batch = graph_batch(manifest, graph, max_batch)
    return ModelConfig(
        name=names.of(graph),
        platform=platform,
        max_batch_size=batch,
        inputs=tuple(_without_batch(port, batch) for port in spec.inputs),
        outputs=tuple(_without_batch(port, batch) for port in spec.outputs),
        instances=instances,
        is_on_gpu=is_on_gpu,
        parameters=parameters,
        warmup=warmup,
    )


def preprocess_config(
    manifest: Manifest, names: ModelNames, instances: int, parameters: tuple[tuple[str, str], ...]
) -> ModelConfig:
    """A picture's bytes -> inputs of the image graphs, one picture a request."""
    return ModelConfig(
        name=names.of(PREPROCESS),
        platform="python",
        max_batch_size=0,
        inputs=(IMAGE,),
        outputs=tuple(triton_tensor(port) for port in _prepared(manifest)),
        instances=instances,
        parameters=parameters,
    )


def features_config(manifest: Manifest, names: ModelNames) -> ModelConfig:
    """A picture's bytes -> image features, by the preprocessing and the image graphs.

    A tensor has the same name in the ensemble as in the graphs, which hand on by name.
    """
    prepared = _pairs(_prepared(manifest))
    steps = [EnsembleStep(names.of(PREPROCESS), ((IMAGE.name, IMAGE.name),), prepared)]
    for graph in manifest.image_graphs:
        spec = manifest.graph(graph)
        steps.append(EnsembleStep(names.of(graph), _pairs(spec.inputs), _pairs(spec.outputs)))
    return ModelConfig(
        name=names.of(FEATURES),
        platform="ensemble",
        max_batch_size=0,
        inputs=(IMAGE,),
        outputs=tuple(triton_tensor(port) for port in _last(manifest).outputs),
        steps=tuple(steps),
    )


def triton_tensor(port: TensorSpec) -> TritonTensor:
    """A port as Triton describes it, with the whole shape."""
    dims = tuple(axis if isinstance(axis, int) else -1 for axis in port.shape)
    return TritonTensor(port.name, f"TYPE_{_TYPES.get(port.dtype, port.dtype.upper())}", dims)


def _without_batch(port: TensorSpec, batch: int) -> TritonTensor:
    tensor = triton_tensor(port)
    return TritonTensor(tensor.name, tensor.data_type, tensor.dims[1:]) if batch else tensor


def _prepared(manifest: Manifest) -> tuple[TensorSpec, ...]:
    """What the image graphs take and none of them gives."""
    given: set[str] = set()
    prepared: dict[str, TensorSpec] = {}
    for graph in manifest.image_graphs:
        spec = manifest.graph(graph)
        prepared |= {port.name: port for port in spec.inputs if port.name not in given}
        given |= {port.name for port in spec.outputs}
    return tuple(prepared.values())


def _last(manifest: Manifest) -> GraphSpec:
    return manifest.graph(manifest.image_graphs[-1])


def _pairs(ports: tuple[TensorSpec, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((port.name, port.name) for port in ports)
