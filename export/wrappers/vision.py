"""Transformers vision towers, read at some of their hidden states and cut above them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vlmport.errors import CheckpointError
from vlmport.export.tracing import GraphPort, TracedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "FeatureLayer",
    "HiddenStateTower",
    "HiddenStateTowers",
    "feature_name",
    "kept_layers",
    "num_vision_tokens",
    "tower_module",
]

# Indices into [embeddings, layer 1, ..., layer N]; negative ones count from the end. The features
# of several are joined, in that order, into longer ones.
FeatureLayer = int | Sequence[int]
_WITH_CLASS_TOKEN = ("clip_vision_model", "dinov2")


class HiddenStateTower(nn.Module):
    """pixel_values -> hidden_states[feature_layer], with the layers above it left out.

    Args:
        vision_tower: a transformers tower with `embeddings` and a list of layers in `encoder`.
        feature_layer: see `FeatureLayer`; None for the tower's own last_hidden_state, which its
            `post_layernorm` has normalized.
        drop_first_token: whether token 0 is left out (the class token of CLIP; for towers without
            one the first patch, as the checkpoints were trained).
    """

    def __init__(
        self,
        vision_tower: PreTrainedModel,
        feature_layer: FeatureLayer | None,
        *,
        drop_first_token: bool,
    ) -> None:
        super().__init__()
        tower = cast("Any", vision_tower)
        config = tower.config
        name = "layers" if hasattr(tower.encoder, "layers") else "layer"
        layers = getattr(tower.encoder, name)[: kept_layers(config, feature_layer)]
        setattr(tower.encoder, name, layers)
        self.vision_tower = vision_tower
        self._layers_name = name
        self._is_normalized = feature_layer is None
        self._read_after = [kept_layers(config, index) for index in _indices(feature_layer)]
        self._drop_first_token = drop_first_token

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes images.

        Args:
            pixel_values: float32 [num_images, 3, height, width].

        Returns:
            float32 [num_images, num_patches, vision_hidden_size].
        """
        tower = cast("Any", self.vision_tower)
        hidden: torch.Tensor = tower.embeddings(pixel_values)
        if hasattr(tower, "pre_layrnorm"):  # transformers' own spelling, CLIP only
            hidden = tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in getattr(tower.encoder, self._layers_name):
            states.append(layer(states[-1], attention_mask=None))
        if self._is_normalized:
            states[-1] = tower.post_layernorm(states[-1])
        features = [states[index] for index in self._read_after]
        joined = torch.cat(features, dim=-1) if len(features) > 1 else features[0]
        return joined[:, 1:] if self._drop_first_token else joined


class HiddenStateTowers(nn.Module):
    """Two towers that see the same pixels; parameter prefixes "vision_tower", "vision_tower_2".

    Args:
        first: the first tower.
        second: the second tower.
    """

    def __init__(self, first: HiddenStateTower, second: HiddenStateTower) -> None:
        super().__init__()
        self.vision_tower = first.vision_tower
        self.vision_tower_2 = second.vision_tower
        # In a tuple they are no submodules of this one, which would name their weights twice.
        self._towers = (first, second)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes images: as `HiddenStateTower`, once for each tower."""
        first, second = self._towers
        return first(pixel_values), second(pixel_values)


def feature_name(tower: int) -> str:
    """Name of the features of a tower, counted from 0, as outputs and inputs of graphs."""
    return "vision_features" if tower == 0 else f"vision_features_{tower + 1}"


def kept_layers(config: PretrainedConfig, feature_layer: FeatureLayer | None) -> int:
    """Layers of a tower that its hidden states depend on; all for None.

    Raises:
        CheckpointError: if the tower has no such hidden state.
    """
    layers: int = config.num_hidden_layers
    kept = [index if index >= 0 else layers + 1 + index for index in _indices(feature_layer)]
    if not kept or not all(0 <= count <= layers for count in kept):
        msg = (
            f"vision_feature_layer: found {feature_layer} for a tower of {layers} layers; "
            f"expected {-layers - 1} to {layers}; correct the checkpoint's config.json"
        )
        raise CheckpointError(msg)
    return max(kept)


def num_vision_tokens(
    config: PretrainedConfig, *, drop_first_token: bool, side: int | None = None
) -> int:
    """Tokens that one image becomes: patches, plus a class token if any, less a dropped one.

    Args:
        config: the tower's config.
        drop_first_token: see `HiddenStateTower`.
        side: pixels of a side; None for those of the config.
    """
    patches: int = ((side or config.image_size) // config.patch_size) ** 2
    return patches + (config.model_type in _WITH_CLASS_TOKEN) - drop_first_token


def tower_module(
    build: Callable[[], PreTrainedModel],
    config: PretrainedConfig,
    feature_layer: FeatureLayer | None,
    *,
    drop_first_token: bool,
    side: int | None = None,
    build_second: Callable[[], PreTrainedModel] | None = None,
) -> TracedModule:
    """The graph "vision_encoder" of one or two towers with images of one size.

    Args:
        build: makes the whole tower; called under the meta device.
        config: the tower's config.
        feature_layer: see `FeatureLayer`.
        drop_first_token: see `HiddenStateTower`.
        side: pixels of a side; None for those of the config.
        build_second: makes a second tower that gives features of the same shape.
    """

    def module() -> nn.Module:
        towers = [
            HiddenStateTower(make(), feature_layer, drop_first_token=drop_first_token)
            for make in (build, build_second)
            if make is not None
        ]
        return towers[0] if len(towers) == 1 else HiddenStateTowers(*towers)

    pixels: int = side or config.image_size
    tokens = num_vision_tokens(config, drop_first_token=drop_first_token, side=side)
    length = config.hidden_size * len(_indices(feature_layer))
    shape = ("num_images", tokens, length)
    count = 1 if build_second is None else 2
    return TracedModule(
        name="vision_encoder",
        build=module,
        inputs=(GraphPort("pixel_values", torch.float32, ("num_images", 3, pixels, pixels)),),
        outputs=tuple(
            GraphPort(feature_name(index), torch.float32, shape) for index in range(count)
        ),
        single_inputs=1,
    )


def _indices(feature_layer: FeatureLayer | None) -> tuple[int, ...]:
    if feature_layer is None:
        return (-1,)
    return (feature_layer,) if isinstance(feature_layer, int) else tuple(feature_layer)
