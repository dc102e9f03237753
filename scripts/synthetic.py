"""Writes synthetic checkpoints of any size, shard by shard, in the merged Factory layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from safetensors.numpy import save_file

from vlmport.export.tracing import build_on_meta
from vlmport.export.wrappers.connectors import mlp_connector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["LLAMA_12X768", "LLAVA_8B", "TINYLLAVA_3B", "TINY_LLAVA", "Shapes", "write_checkpoint"]

_TOKENIZER = Path(__file__).parent.parent / "examples" / "tinyllava"
_SHARD_BYTES = 512 * 1024 * 1024
# Values come from one pool at random offsets: drawing three billion normals takes minutes.
_POOL_VALUES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Shapes:
    """Configs of a synthetic model.

    Attributes:
        text: fields of the language model's config, model_type included.
        vision: fields of the tower's config, model_type included.
    """

    text: dict[str, Any]
    vision: dict[str, Any]


TINYLLAVA_3B = Shapes(
    text={
        "model_type": "phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
    },
    vision={
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
)
# The language model has the layers of Idefics2-8B's, which are those of Mistral-7B; the tower is
# that of the 3B.
LLAVA_8B = Shapes(
    text={
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    },
    vision=TINYLLAVA_3B.vision,
)
TINY_LLAVA = Shapes(
    text={
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
    },
    vision={
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
)
LLAMA_12X768 = Shapes(
    text={
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 16384,
    },
    vision={
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 336,
        "patch_size": 14,
    },
)


def write_checkpoint(folder: Path, shapes: Shapes, dtype: str) -> int:
    """Writes a checkpoint with random weights.

    Args:
        folder: must not exist.
        shapes: configs of the parts.
        dtype: numpy's name of the stored element type.

    Returns:
        Bytes of the weights.
    """
    folder.mkdir(parents=True)
    text = transformers.AutoConfig.for_model(**shapes.text)
    vision = transformers.AutoConfig.for_model(**shapes.vision)
    modules = {
        "vision_tower._vision_tower.vision_model.": lambda: transformers.AutoModel.from_config(
            vision
        ),
        "connector._connector.": lambda: mlp_connector(vision.hidden_size, text.hidden_size, 2),
        "language_model.": lambda: transformers.AutoModelForCausalLM.from_config(text),
    }
    sizes = {
        prefix + name: tuple(value.shape)
        for prefix, build in modules.items()
        for name, value in build_on_meta(build).named_parameters()
    }
    total = _write_shards(folder, sizes, np.dtype(dtype))
    config = {
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "text_config": text.to_dict(),
        "vision_config": vision.to_dict(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (_TOKENIZER / name).is_file():
            shutil.copyfile(_TOKENIZER / name, folder / name)
    return total


def _write_shards(folder: Path, sizes: dict[str, tuple[int, ...]], dtype: np.dtype[Any]) -> int:
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(sizes, dtype)):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(array.nbytes for array in shard.values())
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, "utf-8")
    return total


def _shards(
    sizes: dict[str, tuple[int, ...]], dtype: np.dtype[Any]
) -> Iterator[dict[str, NDArray[Any]]]:
    generator = np.random.default_rng(0)
    pool = (generator.standard_normal(_POOL_VALUES, np.float32) * 0.02).astype(dtype)
    shard: dict[str, NDArray[Any]] = {}
    for name, shape in sizes.items():
        if sum(array.nbytes for array in shard.values()) > _SHARD_BYTES:
            yield shard
            shard = {}
        count = int(np.prod(shape))
        start = int(generator.integers(_POOL_VALUES))
        values = np.resize(np.roll(pool, start), count).reshape(shape)
        if "norm" in name and name.endswith("weight"):
            values = values + dtype.type(1)
        shard[name] = values
    yield shard
