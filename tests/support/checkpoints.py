"""Builds small random checkpoints in every layout that is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from support.checkpoint_layouts import (
    save_bench,
    save_merged,
    save_separate,
    save_shards,
    stored_state,
    tower_state,
)
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from torch import nn
from transformers.activations import ACT2FN

from vlmport.export.reference_connectors import ReferenceInterleavedMlps
from vlmport.export.wrappers.connectors import PerceiverResampler, mlp_connector

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Recipe",
    "connector_module",
    "make_checkpoint",
    "make_tokenizer",
    "random_weights",
    "save_image_processor",
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


# Fields of a config; a tuple, so that recipes can be compared and printed.
Sizes = tuple[tuple[str, Any], ...]


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
    window: int | None = None  # of the upper layer's attention, where the language model has one
    layers: tuple[int, ...] = (-2,)  # hidden states of the tower; several in transformers' layout
    activation: str = "gelu"  # of the projector in transformers' layout
    max_prompt: int = 1024  # tokens of a prompt with images that are kept
    text: Sizes = ()  # of the language model, beside or in place of the small ones
    vision: Sizes = ()  # of the tower, likewise
    seen: int = _IMAGE  # pixels of a side that a Dinov2 tower's processor makes

    @property
    def name(self) -> str:
        parts = (self.layout, self.language_model, self.tower, self.connector, self.aspect)
        ends = [self.select, "tied" if self.tied else "untied"]
        ends += [f"window{self.window}"] if self.window else []
        ends += [f"layers{self.layers}"] if len(self.layers) > 1 else []
        ends += [self.activation] if self.activation != "gelu" else []
        return "-".join((*parts, *ends))


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
    text, vision = _text_config(recipe), vision_config(recipe.tower, recipe.vision)
    if recipe.connector == "identity":
        vision.hidden_size = text.hidden_size
    assert vision.hidden_size % vision.num_attention_heads == 0
    tower = random_weights(tower_module(recipe.tower, vision))
    language_model = random_weights(transformers.AutoModelForCausalLM.from_config(text))
    connector = random_weights(
        connector_module(
            recipe.connector,
            vision.hidden_size * len(recipe.layers),
            text.hidden_size,
            recipe.activation,
        )
    )
    if recipe.layout == "transformers":
        _save_transformers(folder, recipe, text, vision, (tower, connector, language_model))
        return folder
    make_tokenizer(folder)
    if recipe.tower == "mof":
        # Its config.json is found by its name, as a released tower's would be in this repository.
        (folder / "second").mkdir()
        second = json.dumps(_second_config(vision).to_dict())
        (folder / "second" / "config.json").write_text(second)
    config = _factory_config(recipe, text, vision)
    states = [stored_state(module, recipe.dtype) for module in (tower, connector, language_model)]
    states[0] = tower_state(recipe.tower, states[0])
    if recipe.tied:
        states[2].pop("lm_head.weight", None)
    if recipe.layout == "merged":
        save_merged(folder, states)
    elif recipe.layout == "separate":
        save_separate(folder, states)
    else:
        config = _bench_config(folder, recipe, text, vision)
        save_bench(folder, states)
    if recipe.tower.startswith("dinov2"):
        save_image_processor(folder, recipe.tower, recipe.seen)
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
    if recipe.language_model == "gemma":
        sizes |= {"head_dim": 24, "num_key_value_heads": 1, "pad_token_id": 0}
    if recipe.window:
        window = {"use_sliding_window": True, "sliding_window": recipe.window}
        sizes |= window | {"max_window_layers": 1}
    return transformers.AutoConfig.for_model(recipe.language_model, **sizes | dict(recipe.text))


def vision_config(tower: str, sizes_instead: Sizes = ()) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": _IMAGE,
        "patch_size": 14,
    }
    if tower.startswith("dinov2"):
        # A position embedding for 6 x 6 patches; pictures have 4 x 4, as in real checkpoints,
        # where it is made for 37 x 37 and pictures have 16 x 16.
        del sizes["intermediate_size"]
        sizes |= {"image_size": 84, "mlp_ratio": 2, "use_swiglu_ffn": tower.endswith("giant")}
    sizes |= dict(sizes_instead)
    own = {"mof": "clip_vision_model", "dinov2": "dinov2", "dinov2-giant": "dinov2"}
    name = own.get(tower, f"{tower}_vision_model")
    return transformers.AutoConfig.for_model(name, **sizes)


def tower_module(tower: str, config: Any) -> nn.Module:
    """The tower; of a mixture both, under the names that Factory gives them."""
    module: nn.Module = transformers.AutoModel.from_config(config)
    if tower != "mof":
        return module
    second = transformers.AutoModel.from_config(_second_config(config))
    return nn.ModuleDict({"clip": module, "dinov2": second})


def _second_config(first: Any) -> Any:
    """Of the Dinov2 tower beside a CLIP tower."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return vision_config("dinov2", tuple((name, getattr(first, name)) for name in sizes))


def connector_module(
    kind: str, vision_hidden_size: int, hidden_size: int, activation: str = "gelu"
) -> nn.Module:
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(vision_hidden_size, hidden_size)
    if kind == "resampler":
        return PerceiverResampler(vision_hidden_size, hidden_size, 8, 2)
    if kind == "mof_mlp":
        return ReferenceInterleavedMlps(vision_hidden_size, hidden_size)
    if kind == "qformer":
        return query_transformer(vision_hidden_size, hidden_size, 8)
    return mlp_connector(
        vision_hidden_size, hidden_size, int(kind[3]), activation=lambda: ACT2FN[activation]
    )


def query_transformer(vision_hidden_size: int, hidden_size: int, num_queries: int) -> nn.Module:
    """BERT's encoder with two heads of 64, in transformers' own modules, as Factory cuts it."""
    config: Any = transformers.Blip2QFormerConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=160,
        encoder_hidden_size=vision_hidden_size,
        use_qformer_text_input=False,
    )
    module = nn.Module()
    module.query_tokens = nn.Parameter(torch.zeros(1, num_queries, 128))
    module.bert = nn.Module()
    module.bert.encoder = transformers.Blip2QFormerModel(config).encoder
    module.projector = nn.Linear(128, hidden_size)
    return module


_TABLES = ("embed_tokens", "position_embedding", "latents", "query_tokens", "cls_token")


def _is_gemma(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "model_type", "") == "gemma"


def random_weights(module: nn.Module) -> nn.Module:
    """Draws weights at scales that make greedy tokens vary."""
    for name, parameter in module.named_parameters():
        is_norm = "norm" in name or "pre_layrnorm" in name
        with torch.no_grad():
            if (is_norm and name.endswith("weight")) or name.endswith("lambda1"):
                parameter.uniform_(0.7, 1.3)
            elif any(part in name for part in _TABLES):
                # Gemma scales its embeddings by the root of their length.
                is_scaled = "embed_tokens" in name and _is_gemma(module)
                parameter.normal_(0, 0.05 if is_scaled else 0.5)
            else:
                parameter.normal_(0, 0.12 if parameter.ndim > 1 else 0.05)
    return module.eval()


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
        "tokenizer_model_max_length": recipe.max_prompt,
        **({"vision_model_name_or_path2": "mof:second"} if recipe.tower == "mof" else {}),
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
        vision_feature_layer=recipe.layers[0] if len(recipe.layers) == 1 else list(recipe.layers),
        projector_hidden_act=recipe.activation,
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
    save_image_processor(folder, recipe.tower, vision.image_size)


def save_image_processor(folder: Path, tower: str, side: int = _IMAGE) -> None:
    """Writes preprocessor_config.json as the tower was released with, at a small size."""
    square = {"height": side, "width": side}
    if tower.startswith("dinov2"):
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        transformers.BitImageProcessorPil(
            size={"shortest_edge": side + 8}, crop_size=square, image_mean=mean, image_std=std
        ).save_pretrained(folder)
        return
    image_processor: Any = (
        transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
        if tower in ("clip", "mof")
        else transformers.SiglipImageProcessorPil(size=square)
    )
    image_processor.save_pretrained(folder)
