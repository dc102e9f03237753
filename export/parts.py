"""Tower, connector and language model as the graphs that are traced from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from vlmport.export.tracing import build_on_meta
from vlmport.export.weight_match import collect_tensors, match_weights, tensor_shapes
from vlmport.export.wrappers.connectors import projector_module
from vlmport.export.wrappers.decoder import ATTENTION, decoder_module, kv_layout
from vlmport.export.wrappers.embedding import embedding_module
from vlmport.export.wrappers.vision import kept_layers, num_vision_tokens, tower_module

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from vlmport.contract import KVLayout
    from vlmport.export.tensor_store import TensorStore, WeightFile
    from vlmport.export.tracing import TracedModule
    from vlmport.export.weight_match import PrefixRule

__all__ = ["Parts", "causal_language_model", "part_store"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The three parts of a model with images of one size.

    Attributes:
        text: config of the causal language model.
        tower: config of the vision tower.
        feature_layer: index into the tower's hidden states; None for its normalized last one.
        drop_first_token: whether the tower's token 0 is left out.
        connector: makes the connector; runs under the meta device too.
        connector_tokens: image tokens that the connector gives; None for as many as come in.
        head_bias: whether the language model's output head keeps the bias that its class gives it.
        is_bidirectional: whether the tokens of the prompt all see each other.
    """

    text: PretrainedConfig
    tower: PretrainedConfig
    feature_layer: int | None
    drop_first_token: bool
    connector: Callable[[], nn.Module]
    connector_tokens: int | None
    head_bias: bool
    is_bidirectional: bool = False

    @property
    def vision_tokens(self) -> int:
        """Tokens of one image before the connector."""
        return num_vision_tokens(self.tower, drop_first_token=self.drop_first_token)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in the language model."""
        return self.vision_tokens if self.connector_tokens is None else self.connector_tokens

    @property
    def kv_layout(self) -> KVLayout:
        """Form of the cache."""
        return kv_layout(self.text)

    def build_tower(self) -> PreTrainedModel:
        """The whole tower, on the current default device."""
        # Without a dtype, the one that a half-precision checkpoint's config names would be used.
        tower = AutoModel.from_config(self.tower, dtype=torch.float32)
        return cast("PreTrainedModel", tower)

    def build_language_model(self, attention: str) -> PreTrainedModel:
        """The causal language model, on the current default device.

        Args:
            attention: name of a registered attention function.
        """
        model = causal_language_model(self.text, attention)
        head = cast("nn.Linear", model.get_output_embeddings())
        if not self.head_bias and cast("Any", head).bias is not None:
            head = nn.Linear(head.in_features, head.out_features, bias=False)
            model.set_output_embeddings(head)
        return model

    def graphs(self) -> tuple[TracedModule, ...]:
        """What to trace."""
        hidden: int = self.text.hidden_size

        def language_model() -> PreTrainedModel:
            return self.build_language_model(ATTENTION)

        return (
            tower_module(
                self.build_tower,
                self.tower,
                self.feature_layer,
                drop_first_token=self.drop_first_token,
            ),
            projector_module(
                self.connector,
                self.vision_tokens,
                self.tower.hidden_size,
                self.image_tokens,
                hidden,
            ),
            embedding_module(language_model, hidden),
            decoder_module(
                language_model,
                self.text,
                self.text.vocab_size,
                is_bidirectional=self.is_bidirectional,
            ),
        )


def causal_language_model(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The causal language model of a config, on the current default device.

    Args:
        config: is not changed.
        attention: name of a registered attention function.
    """
    # transformers writes the attention's name into the config that it is given.
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
    )
    return cast("PreTrainedModel", model)


def part_store(
    checkpoint: Path,
    parts: Parts,
    groups: Sequence[tuple[Sequence[WeightFile], Sequence[PrefixRule]]],
) -> TensorStore:
    """The checkpoint's tensors under "vision_tower.", "connector." and "language_model.".

    Args:
        checkpoint: folder, for messages.
        parts: the modules that the tensors must fit.
        groups: files of weights, with the rules that rename their tensors.

    Raises:
        CheckpointError: with all missing, extra and misshapen tensors at once.
    """
    found: dict[str, tuple[WeightFile, str]] = {}
    for files, rules in groups:
        found |= collect_tensors(files, rules)
    modules = {
        "vision_tower": build_on_meta(parts.build_tower),
        "connector": build_on_meta(parts.connector),
        # Only names and shapes are asked for; not every model has "sdpa" (Gemma 2 soft-caps).
        "language_model": build_on_meta(lambda: parts.build_language_model("eager")),
    }
    expected = tensor_shapes(modules)
    kept = kept_layers(parts.tower, parts.feature_layer)
    unused = range(kept, parts.tower.num_hidden_layers)
    dead = [f"vision_tower.encoder.layers.{index}." for index in unused]
    dead += ["vision_tower.head."]
    dead += ["vision_tower.post_layernorm."] if parts.feature_layer is not None else []
    tied = _tied_weights(cast("Any", modules["language_model"]), parts.text)
    return match_weights(
        checkpoint, expected, found, lambda name: name.startswith(tuple(dead)), tied
    )


def _tied_weights(model: Any, text: PretrainedConfig) -> dict[str, str]:
    """Output head -> input embedding, if the language model shares them."""
    if not text.tie_word_embeddings:
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    origin = names[id(model.get_input_embeddings().weight)]
    return {"language_model.lm_head.weight": f"language_model.{origin}"}
