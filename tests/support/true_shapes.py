"""Decoders and vision towers with the layers of released models, two of each, random weights.

Nothing is downloaded and no PyTorch model is ever filled: graphs are traced without weights, and
what is written comes from one small pool of random numbers.
"""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers.models.idefics2 import modeling_idefics2

from vlmport.api.export import traced_graph
from vlmport.export.parts import causal_language_model
from vlmport.export.precision import graph_in_precision
from vlmport.export.stream import save_graph
from vlmport.export.tensor_store import StoredTensor, TensorStore
from vlmport.export.tracing import build_on_meta
from vlmport.export.wrappers.decoder import ATTENTION, decoder_module, in_place_attention
from vlmport.export.wrappers.native_vision import masked_projector_module, native_tower_module
from vlmport.export.wrappers.vision import tower_module

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.contract import Precision
    from vlmport.export.tracing import TracedModule

__all__ = ["CONNECTORS", "DECODERS", "TOWERS", "TrueShape", "write_graph"]

_POOL_VALUES = 1024 * 1024
VOCAB = 1024  # the released models' heads have up to 262144 rows, of the same kind


@dataclass(frozen=True, slots=True)
class TrueShape:
    """One graph.

    Attributes:
        config: fields of the config as the released checkpoint has them, but for the number of
            layers and of tokens; model_type included.
        head_dim: length of one attention head.
        is_bidirectional: whether a prompt's tokens all see each other.
    """

    config: dict[str, Any]
    head_dim: int
    is_bidirectional: bool = False


DECODERS = {
    "Fuyu-8B": TrueShape(
        {
            "model_type": "persimmon",
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_attention_heads": 64,
            "max_position_embeddings": 16384,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 25000.0,
                "partial_rotary_factor": 0.5,
            },
            "qk_layernorm": True,
            "hidden_act": "relu2",
        },
        64,
    ),
    "Idefics2-8B": TrueShape(
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        128,
    ),
    "TinyLLaVA-3.1B": TrueShape(
        {
            "model_type": "phi",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.4,
            },
        },
        80,
    ),
    "PaliGemma-3B": TrueShape(
        {
            "model_type": "gemma",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 8192,
        },
        256,
        is_bidirectional=True,
    ),
    "PaliGemma2-3B": TrueShape(
        {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 8192,
        },
        256,
        is_bidirectional=True,
    ),
}
# SigLIP so400m/14 has heads of 72, as Idefics2's own tower has; CLIP ViT-L/14 has heads of 64.
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "patch_size": 14,
}
TOWERS = {
    "SigLIP so400m": TrueShape(
        {"model_type": "siglip_vision_model", "image_size": 224, **_SO400M}, 72
    ),
    "Idefics2 tower": TrueShape(
        {"model_type": "idefics2_vision", "image_size": 980, **_SO400M}, 72
    ),
    "CLIP ViT-L": TrueShape(
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        64,
    ),
}

# The perceiver that makes 64 image tokens of a picture's patches.
CONNECTORS = {"Idefics2 connector": TrueShape({"model_type": "idefics2"}, 96)}


@dataclass
class _Pool:
    """Stands for a file of weights of any shape."""

    tensors: dict[str, StoredTensor]
    path: Path = field(default=Path("pool"))

    def __post_init__(self) -> None:
        drawn = np.random.default_rng(0).normal(0, 0.02, _POOL_VALUES)
        self._values = drawn.astype(np.float16)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        shape = self.tensors[name].shape
        wanted = (stop - start, *shape[1:]) if shape else ()
        # Equal weights would be stored once in an engine.
        own = np.roll(self._values, zlib.crc32(f"{name} {start}".encode()) % _POOL_VALUES)
        values = np.resize(own, math.prod(wanted)).reshape(wanted)
        # Gemma multiplies by 1 + weight, the others by the weight.
        return values + np.float16(1) if "norm" in name and len(shape) == 1 else values


def write_graph(folder: Path, shape: TrueShape, precision: Precision) -> Path:
    """Writes a decoder, a vision tower or a connector; two layers, of a connector one.

    Returns:
        Path of the graph, its weights beside it.
    """
    graph = _graph(shape)
    passed_on = {port.name for port in (*graph.inputs, *graph.outputs)} - {"pixel_values"}
    graph = graph_in_precision(graph, precision, passed_on)
    with in_place_attention():
        module = build_on_meta(graph.build, graph.dtype)
    dtype = np.dtype(np.float16)
    tensors = {
        name: StoredTensor(name, dtype, tuple(value.shape))
        for name, value in module.named_parameters(remove_duplicate=False)
    }
    pool = _Pool(tensors)
    store = TensorStore({name: (pool, name) for name in tensors})
    path = folder / f"{graph.name}.onnx"
    save_graph(traced_graph(graph), path, store, lambda _: None)
    return path


def _graph(shape: TrueShape) -> TracedModule:
    fields = {**shape.config, "num_hidden_layers": 2}
    kind = fields.pop("model_type")
    if kind == "idefics2":
        return _connector()
    if kind == "idefics2_vision":
        return _native_tower(fields)
    if "image_size" in fields:
        config = transformers.AutoConfig.for_model(kind, **fields)
        return tower_module(
            lambda: transformers.AutoModel.from_config(config, dtype=torch.get_default_dtype()),
            config,
            -1,
            drop_first_token=False,
        )
    config = transformers.AutoConfig.for_model(kind, **fields, vocab_size=VOCAB)
    return decoder_module(
        lambda: causal_language_model(config, ATTENTION),
        config,
        VOCAB,
        is_bidirectional=shape.is_bidirectional,
    )


def _native_tower(fields: dict[str, Any]) -> TracedModule:
    config: Any = transformers.Idefics2Config(vision_config=fields).vision_config

    def tower() -> Any:
        dtype = torch.get_default_dtype()
        return modeling_idefics2.Idefics2VisionTransformer._from_config(config, dtype=dtype)

    return native_tower_module(tower, config)


def _connector() -> TracedModule:
    text = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336}
    config = transformers.Idefics2Config(
        text_config=text,
        vision_config={"hidden_size": 1152, "intermediate_size": 4304},
        perceiver_config={"resampler_depth": 1},
    )
    perceiver: Any = config.perceiver_config
    latents = perceiver.resampler_n_latents
    build: Any = modeling_idefics2.Idefics2Connector  # its signature is not typed
    return masked_projector_module(lambda: build(copy.deepcopy(config)), 1152, latents, 4096)
