"""A transformers vision tower, read at one of its hidden states and cut above it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vlmport.errors import CheckpointError
from vlmport.export.tracing import GraphPort, TracedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["HiddenStateTower", "kept_layers", "num_vision_tokens", "tower_module"]


class HiddenStateTower(nn.Module):
    """pixel_values -> hidden_states[feature_layer], with the layers above it left out.

    Args:
        vision_tower: a transformers tower with `embeddings` and `encoder.layers`.
        feature_layer: index into [embeddings, layer 1, ..., layer N]; negative counts from the end.
            None for the tower's own last_hidden_state, which its `post_layernorm` has normalized.
        drop_first_token: whether token 0 is left out (the class token of CLIP; for towers without
            one the first patch, as the checkpoints were trained).
    """

    def __init__(
        self, vision_tower: PreTrainedModel, feature_layer: int | None, *, drop_first_token: bool
    ) -> None:
        super().__init__()
        tower = cast("Any", vision_tower)
        tower.encoder.layers = tower.encoder.layers[: kept_layers(tower.config, feature_layer)]
        self.vision_tower = vision_tower
        self._is_normalized = feature_layer is None
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
        for layer in tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        if self._is_normalized:
            hidden = tower.post_layernorm(hidden)
        return hidden[:, 1:] if self._drop_first_token else hidden


def kept_layers(config: PretrainedConfig, feature_layer: int | None) -> int:
    """Layers of a tower that a hidden state depends on; all for None.

    Raises:
        CheckpointError: if the tower has no such hidden state.
    """
    layers: int = config.num_hidden_layers
    if feature_layer is None:
        return layers
    kept = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 <= kept <= layers:
        msg = (
            f"vision_feature_layer: found {feature_layer} for a tower of {layers} layers; "
            f"expected {-layers - 1} to {layers}; correct the checkpoint's config.json"
        )
        raise CheckpointError(msg)
    return kept


def num_vision_tokens(config: PretrainedConfig, *, drop_first_token: bool) -> int:
    """Tokens that one image becomes: patches, plus a class token for CLIP, less a dropped one."""
    patches: int = (config.image_size // config.patch_size) ** 2
    has_class_token = config.model_type == "clip_vision_model"
    return patches + has_class_token - drop_first_token


def tower_module(
    build: Callable[[], PreTrainedModel],
    config: PretrainedConfig,
    feature_layer: int | None,
    *,
    drop_first_token: bool,
) -> TracedModule:
    """The graph "vision_encoder" of a tower with images of one size.

    Args:
        build: makes the whole tower; called under the meta device.
        config: the tower's config.
        feature_layer: see `HiddenStateTower`.
        drop_first_token: see `HiddenStateTower`.
    """
    side: int = config.image_size
    tokens = num_vision_tokens(config, drop_first_token=drop_first_token)
    return TracedModule(
        name="vision_encoder",
        build=lambda: HiddenStateTower(build(), feature_layer, drop_first_token=drop_first_token),
        inputs=(GraphPort("pixel_values", torch.float32, ("num_images", 3, side, side)),),
        outputs=(
            GraphPort("vision_features", torch.float32, ("num_images", tokens, config.hidden_size)),
        ),
        single_inputs=1,
    )
