"""The part of Triton's ModelConfig that the models of a repository use, as frozen values.

Source: https://github.com/triton-inference-server/common, protobuf/model_config.proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EnsembleStep", "ModelConfig", "Platform", "TritonTensor", "WarmupInput"]

Platform = Literal["python", "onnxruntime", "tensorrt", "ensemble"]


@dataclass(frozen=True, slots=True)
class TritonTensor:
    """An input or output of a model.

    Attributes:
        name: the graph's.
        data_type: member of Triton's DataType, "TYPE_FP32".
        dims: lengths, -1 for an axis that may change; without the batch axis where Triton batches.
        is_optional: whether a request may leave the input out.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """What an input holds in the request that a model gets before it is ready.

    Attributes:
        tensor: of real lengths only.
        content: the bytes, row by row; empty for zeros.
    """

    tensor: TritonTensor
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class EnsembleStep:
    """One model that an ensemble runs.

    Attributes:
        model: its name.
        inputs: (input of the model, tensor of the ensemble).
        outputs: (output of the model, tensor of the ensemble).
    """

    model: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model of a repository.

    Attributes:
        name: also of its folder.
        platform: what runs it.
        max_batch_size: 0 for a model that Triton does not batch; its dims are then whole shapes.
        inputs: in their order.
        outputs: in their order.
        instances: copies of the model; 0 for an ensemble, which has none.
        is_on_gpu: whether they run on the first GPU that the server sees.
        is_decoupled: whether a request may have any number of responses.
        parameters: (key, text), which a Python model reads.
        warmup: inputs of the first request; none for no such request.
        steps: of an ensemble.
    """

    name: str
    platform: Platform
    max_batch_size: int
    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]
    instances: int = 0
    is_on_gpu: bool = False
    is_decoupled: bool = False
    parameters: tuple[tuple[str, str], ...] = ()
    warmup: tuple[WarmupInput, ...] = ()
    steps: tuple[EnsembleStep, ...] = ()
