"""Builds small random checkpoints in every layout that is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from torch import nn

from vlmport.export.wrappers.connectors import PerceiverResampler, mlp_connector

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Recipe",
    "connector_module",
    "make_checkpoint",
    "make_tokenizer",
    "random_weights",
    "save_shards",
    "vision_config",
]

VOCAB = 320
_IMAGE = 56
_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: What is in the picture? "
    "ASSISTANT: A red circle and two blue squares. How many shapes are there? Which colour?"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a checkpoint is made of."""

    language_model: str = "llama"
    tower: str = "siglip"
    connector: str = "mlp2x_gelu"
    aspect: str = "square"
    select: str = "patch"
    layout: str = "merged"
    tied: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def name(self) -> str:
        parts = (self.layout, self.language_model, self.tower, self.connector, self.aspect)
        return "-".join((*parts, self.select, "tied" if self.tied else "untied"))


def make_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """A small byte-fallback BPE tokenizer in the form of Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *extra, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False, initial_alphabet=[]
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    content = json.loads(tokenizer.to_str())
    # Byte tokens are ordinary tokens, not special ones.
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)


def make_checkpoint(folder: Path, recipe: Recipe) -> Path:
    """Writes a checkpoint with random weights that make greedy tokens vary.

    Source of the scales: with transformers' own initialisation logits are nearly uniform, and
    parity of greedy tokens would prove nothing.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(recipe.seed)
    text, vision = _text_config(recipe), vision_config(recipe.tower)
    tower = random_weights(transformers.AutoModel.from_config(vision))
    language_model = random_weights(transformers.AutoModelForCausalLM.from_config(text))
    connector = random_weights(
        connector_module(recipe.connector, vision.hidden_size, text.hidden_size)
    )
    if recipe.layout == "transformers":
        _save_transformers(folder, recipe, text, vision, (tower, connector, language_model))
        return folder
    make_tokenizer(folder)
    config = _factory_config(recipe, text, vision)
    states = [_state(module, recipe.dtype) for module in (tower, connector, language_model)]
    if recipe.tied:
        states[2].pop("lm_head.weight", None)
    if recipe.layout == "merged":
        _save_merged(folder, states)
    elif recipe.layout == "separate":
        _save_separate(folder, states)
    else:
        config = _bench_config(folder, recipe, text, vision)
        _save_bench(folder, states)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _text_config(recipe: Recipe) -> Any:
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": recipe.tied,
    }
    if recipe.language_model == "stablelm":
        sizes["use_qkv_bias"] = True
    return transformers.AutoConfig.for_model(recipe.language_model, **sizes)


def vision_config(tower: str) -> Any:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": _IMAGE,
        "patch_size": 14,
    }
    return transformers.AutoConfig.for_model(f"{tower}_vision_model", **sizes)


def connector_module(kind: str, vision_hidden_size: int, hidden_size: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(vision_hidden_size, hidden_size)
    if kind == "resampler":
        return PerceiverResampler(vision_hidden_size, hidden_size, 8, 2)
    return mlp_connector(vision_hidden_size, hidden_size, int(kind[3]))


def random_weights(module: nn.Module) -> nn.Module:
    """Draws weights at scales that make greedy tokens vary."""
    for name, parameter in module.named_parameters():
        is_norm = "norm" in name or "pre_layrnorm" in name
        with torch.no_grad():
            if is_norm and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
            elif "embed_tokens" in name or "position_embedding" in name or "latents" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 0.12 if parameter.ndim > 1 else 0.05)
    return module.eval()


def _state(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    # With duplicates: a tied head is there under its own name too, as in real checkpoints.
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: value.detach().to(dtype).clone() for name, value in parameters}


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _save_merged(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    merged = (
        _prefixed("vision_tower._vision_tower.vision_model.", states[0])
        | _prefixed("connector._connector.", states[1])
        | _prefixed("language_model.", states[2])
    )
    save_shards(folder, merged)


def save_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes two safetensors shards and their index."""
    names = sorted(state)
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half]}
    shards["model-00002-of-00002.safetensors"] = names[half:]
    for file, keys in shards.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save_separate(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    parts = {
        "vision_tower": _prefixed("vision_model.", states[0]),
        "connector": _prefixed("_connector.", states[1]),
        "language_model": states[2],
    }
    for name, state in parts.items():
        (folder / name).mkdir()
        torch.save(state, folder / name / "pytorch_model.bin")
        (folder / name / "config.json").write_text("{}")


def _save_bench(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    state = (
        _prefixed("model.vision_tower.vision_tower.vision_model.", states[0])
        | _prefixed("model.mm_projector.", states[1])
        | states[2]
    )
    torch.save(state, folder / "pytorch_model.bin")


def _factory_config(recipe: Recipe, text: Any, vision: Any) -> dict[str, Any]:
    return {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "connector_type": recipe.connector,
        "text_config": text.to_dict() | {"torch_dtype": str(recipe.dtype).removeprefix("torch.")},
        "vision_config": vision.to_dict() | {"torch_dtype": "float16"},
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "vision_hidden_size": vision.hidden_size,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": recipe.select,
        "image_aspect_ratio": recipe.aspect,
        "num_queries": 8,
        "num_resampler_layers": 2,
        "image_token_index": -200,
        "tokenizer_model_max_length": 1024,
    }


def _bench_config(folder: Path, recipe: Recipe, text: Any, vision: Any) -> dict[str, Any]:
    tower = folder / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(vision.to_dict()))
    own: dict[str, Any] = text.to_dict()
    return own | {
        "model_type": f"tiny_llava_{recipe.language_model}",
        "mm_vision_tower": "tower",
        "mm_projector_type": recipe.connector,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": recipe.select,
        "image_aspect_ratio": recipe.aspect,
        "num_queries": 8,
        "num_resampler_layers": 2,
    }


def _save_transformers(
    folder: Path, recipe: Recipe, text: Any, vision: Any, parts: tuple[nn.Module, ...]
) -> None:
    make_tokenizer(folder, ("<image>",))
    image_token = 3
    strategy: Any = "default" if recipe.select == "patch" else "full"
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    model: Any = transformers.LlavaForConditionalGeneration(config)
    tower, connector, language_model = (part.state_dict() for part in parts)
    model.model.vision_tower.load_state_dict(tower)
    projector = {f"linear_{1 + int(k[0]) // 2}.{k[2:]}": v for k, v in connector.items()}
    model.model.multi_modal_projector.load_state_dict(projector)
    body = {k.removeprefix("model."): v for k, v in language_model.items() if k[:6] == "model."}
    model.model.language_model.load_state_dict(body)
    model.lm_head.weight.data = language_model["lm_head.weight"]
    model.save_pretrained(folder)
    square = {"height": _IMAGE, "width": _IMAGE}
    image_processor: Any = (
        transformers.CLIPImageProcessorPil(size={"shortest_edge": _IMAGE}, crop_size=square)
        if recipe.tower == "clip"
        else transformers.SiglipImageProcessorPil(size=square)
    )
    image_processor.save_pretrained(folder)
