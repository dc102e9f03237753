"""Tower, connector and language model as the graphs that are traced from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from vlmport.export.derived_weights import ComputedTensor
from vlmport.export.tensor_store import TensorStore
from vlmport.export.tracing import build_on_meta
from vlmport.export.weight_match import collect_tensors, match_weights, tensor_shapes
from vlmport.export.wrappers.connectors import projector_module
from vlmport.export.wrappers.decoder import ATTENTION, decoder_module, kv_layout
from vlmport.export.wrappers.embedding import embedding_module
from vlmport.export.wrappers.vision import kept_layers, num_vision_tokens, tower_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedModel

    from vlmport.contract import KVLayout
    from vlmport.export.tensor_store import WeightFile
    from vlmport.export.tracing import TracedModule
    from vlmport.export.weight_match import PrefixRule
    from vlmport.export.wrappers.vision import FeatureLayer

__all__ = [
    "Parts",
    "causal_language_model",
    "graph_store",
    "match_parts",
    "module_store",
    "part_store",
]

_POSITIONS = "embeddings.position_embeddings"


@dataclass(frozen=True, slots=True)
class Parts:
    """The three parts of a model with images of one size.

    Attributes:
        text: config of the causal language model.
        tower: config of the vision tower.
        feature_layer: which of the tower's hidden states; None for its normalized last one.
        drop_first_token: whether the tower's token 0 is left out.
        connector: makes the connector; runs under the meta device too.
        connector_tokens: image tokens that the connector gives; None for as many as come in.
        head_bias: whether the language model's output head keeps the bias that its class gives it.
        is_bidirectional: whether the tokens of the prompt all see each other.
        second_tower: config of a second tower that sees the same pixels and gives features of the
            same shape; the connector takes both.
        side: pixels of an image's side; None for those of the tower's config. Towers whose position
            embedding has another size resample it.
        image_scale: factor of the image features behind the connector; None for none.
    """

    text: PretrainedConfig
    tower: PretrainedConfig
    feature_layer: FeatureLayer | None
    drop_first_token: bool
    connector: Callable[[], nn.Module]
    connector_tokens: int | None
    head_bias: bool
    is_bidirectional: bool = False
    second_tower: PretrainedConfig | None = None
    side: int | None = None
    image_scale: float | None = None

    @property
    def vision_tokens(self) -> int:
        """Tokens of one image before the connector."""
        return num_vision_tokens(self.tower, drop_first_token=self.drop_first_token, side=self.side)

    @property
    def towers(self) -> dict[str, PretrainedConfig]:
        """Configs of the towers by the prefix of their weights."""
        towers = {"vision_tower": self.tower}
        return (
            towers if self.second_tower is None else towers | {"vision_tower_2": self.second_tower}
        )

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in the language model."""
        return self.vision_tokens if self.connector_tokens is None else self.connector_tokens

    @property
    def kv_layout(self) -> KVLayout:
        """Form of the cache."""
        return kv_layout(self.text)

    def build_tower(self, name: str = "vision_tower") -> PreTrainedModel:
        """A whole tower as the checkpoint has it, on the current default device and dtype.

        Args:
            name: prefix of its weights.
        """
        # Without a dtype, the one that a half-precision checkpoint's config names would be used.
        tower = AutoModel.from_config(self.towers[name], dtype=torch.get_default_dtype())
        return cast("PreTrainedModel", tower)

    def build_graph_tower(self, name: str) -> PreTrainedModel:
        """The same, with a position embedding for images of `side`, which it then only adds."""
        config = copy.deepcopy(self.towers[name])
        if self.side is not None:
            config.image_size = self.side
        tower = AutoModel.from_config(config, dtype=torch.get_default_dtype())
        return cast("PreTrainedModel", tower)

    def build_language_model(self, attention: str = "sdpa") -> PreTrainedModel:
        """The causal language model, on the current default device and in the default dtype.

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

        vision, *others = [partial(self.build_graph_tower, name) for name in self.towers]
        tower = tower_module(
            vision,
            self.tower,
            self.feature_layer,
            drop_first_token=self.drop_first_token,
            side=self.side,
            build_second=others[0] if others else None,
        )
        vision_length = tower.outputs[0].shape[-1]
        assert isinstance(vision_length, int)
        return (
            tower,
            projector_module(
                self.connector,
                self.vision_tokens,
                vision_length,
                self.image_tokens,
                hidden,
                towers=len(self.towers),
                scale=self.image_scale,
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
    """The causal language model of a config, on the current default device and dtype.

    Args:
        config: is not changed.
        attention: name of a registered attention function.
    """
    # transformers writes the attention's name into the config that it is given.
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.get_default_dtype()
    )
    return cast("PreTrainedModel", model)


def module_store(
    checkpoint: Path,
    build: Mapping[str, Callable[[], nn.Module]],
    files: Sequence[WeightFile],
    rules: Sequence[PrefixRule],
    *,
    has_tied_head: bool,
) -> TensorStore:
    """The checkpoint's tensors under the names of some modules, one of them "language_model".

    Args:
        checkpoint: folder, for messages.
        build: name of a module -> makes it; runs under the meta device.
        files: files of weights.
        rules: rename their tensors.
        has_tied_head: whether the language model's head may share the embedding's weights.

    Raises:
        CheckpointError: with all missing, extra and misshapen tensors at once.
    """
    expected = tensor_shapes({name: build_on_meta(make) for name, make in build.items()})
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    tied = {head: embedding} if has_tied_head else {}
    found = collect_tensors(files, rules)
    return match_weights(checkpoint, expected, found, lambda _: False, tied)


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
    return match_parts(checkpoint, parts, found)


def match_parts(
    checkpoint: Path, parts: Parts, found: Mapping[str, tuple[WeightFile, str]]
) -> TensorStore:
    """The same, of tensors that are renamed already."""
    towers = {name: build_on_meta(partial(parts.build_tower, name)) for name in parts.towers}
    modules = towers | {
        "connector": build_on_meta(parts.connector),
        # Only names and shapes are asked for; not every model has "sdpa" (Gemma 2 soft-caps).
        "language_model": build_on_meta(lambda: parts.build_language_model("eager")),
    }
    expected = tensor_shapes(modules)
    dead = tuple(_dead_prefixes(parts))
    tied = _tied_weights(cast("Any", modules["language_model"]), parts.text)
    return match_weights(checkpoint, expected, found, lambda name: name.startswith(dead), tied)


def graph_store(parts: Parts, store: TensorStore) -> TensorStore:
    """The tensors of the graphs: those of a checkpoint, position embeddings resampled to `side`."""
    entries = dict(store.entries)
    for name, config in parts.towers.items():
        resampled = f"{name}.{_POSITIONS}"
        if parts.side in (None, config.image_size) or resampled not in entries:
            continue
        source = entries[resampled]
        length = (parts.side // config.patch_size) ** 2 + 1
        compute = partial(_resampled, partial(parts.build_tower, name), parts.side)
        shape = (1, length, config.hidden_size)
        entries[resampled] = (ComputedTensor(source, shape, compute), source[1])
    return TensorStore(entries)


def _resampled(
    build: Callable[[], PreTrainedModel], side: int, positions: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A position embedding as transformers' own code resamples it for images of `side`."""
    embeddings = cast("Any", build_on_meta(build)).embeddings
    embeddings.position_embeddings = nn.Parameter(torch.from_numpy(positions), requires_grad=False)
    length = (side // embeddings.patch_size) ** 2 + 1
    # It looks at the number of tokens and their length alone.
    tokens = torch.empty(1, length, positions.shape[-1])
    resampled: torch.Tensor = embeddings.interpolate_pos_encoding(tokens, side, side)
    return resampled.numpy()


def _dead_prefixes(parts: Parts) -> Iterator[str]:
    """What the names of tower weights begin with that no graph needs."""
    for name, tower in parts.towers.items():
        for index in range(kept_layers(tower, parts.feature_layer), tower.num_hidden_layers):
            yield f"{name}.encoder.layers.{index}."
            yield f"{name}.encoder.layer.{index}."
        yield f"{name}.head."
        if parts.feature_layer is not None:
            yield from (f"{name}.post_layernorm.", f"{name}.layernorm.")
        yield f"{name}.embeddings.mask_token"


def _tied_weights(model: Any, text: PretrainedConfig) -> dict[str, str]:
    """Output head -> input embedding, if the language model shares them."""
    if not text.tie_word_embeddings:
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    origin = names[id(model.get_input_embeddings().weight)]
    return {"language_model.lm_head.weight": f"language_model.{origin}"}
