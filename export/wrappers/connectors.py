"""Connectors between a vision tower and a language model, with their checkpoints' own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vlmport.export.tracing import GraphPort, TracedModule
from vlmport.export.wrappers.vision import feature_name

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "InterleavedMlps",
    "PerceiverResampler",
    "Projector",
    "mlp_connector",
    "patch_projector_module",
    "projector_module",
]


class Projector(nn.Module):
    """Gives a connector the parameter prefix "connector.".

    Args:
        connector: vision features, of each tower one tensor -> image_features.
        scale: factor of the image features; None for none.
    """

    def __init__(self, connector: nn.Module, scale: float | None = None) -> None:
        super().__init__()
        self.connector = connector
        self._scale = scale

    def forward(
        self, vision_features: torch.Tensor, vision_features_2: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps [num_images, num_patches, vision_hidden_size] to [.., num_image_tokens, hidden]."""
        both = (vision_features, vision_features_2)
        features = [one for one in both if one is not None]
        image_features = cast("torch.Tensor", self.connector(*features))
        if self._scale is not None:
            return image_features * self._scale
        # An output that is an input itself, as nn.Identity gives it, would lose the input's name.
        return image_features.clone() if image_features is vision_features else image_features


def mlp_connector(
    vision_hidden_size: int,
    hidden_size: int,
    depth: int,
    *,
    bias: bool = True,
    activation: Callable[[], nn.Module] = nn.GELU,
) -> nn.Sequential:
    """Linear, then (GELU, Linear) until there are `depth` Linears ("mlp2x_gelu" has depth 2)."""
    layers: list[nn.Module] = [nn.Linear(vision_hidden_size, hidden_size, bias=bias)]
    for _ in range(depth - 1):
        layers += [activation(), nn.Linear(hidden_size, hidden_size, bias=bias)]
    return nn.Sequential(*layers)


class InterleavedMlps(nn.Module):
    """An MLP for each of two towers; their tokens take turns, those of the first tower first.

    Args:
        vision_hidden_size: length of a vision feature of either tower.
        hidden_size: length of an embedding of the language model.

    Source: Tong et al. 2024, "Eyes Wide Shut?", section 4.3 (interleaved mixture of features);
    parameter names as in the checkpoints that use it.
    """

    def __init__(self, vision_hidden_size: int, hidden_size: int) -> None:
        super().__init__()
        self.clip = mlp_connector(vision_hidden_size, hidden_size, 2)
        self.dinov2 = mlp_connector(vision_hidden_size, hidden_size, 2)

    def forward(
        self, vision_features: torch.Tensor, vision_features_2: torch.Tensor
    ) -> torch.Tensor:
        """Maps twice [num_images, num_patches, vision_hidden_size] to [.., 2 num_patches, hidden].

        Both towers must give the same number of patches.
        """
        pairs = (self.clip(vision_features), self.dinov2(vision_features_2))
        return torch.stack(pairs, dim=2).flatten(1, 2)


class PerceiverResampler(nn.Module):
    """A fixed number of latents attends to the image's tokens and to itself.

    Args:
        vision_hidden_size: length of a vision feature.
        hidden_size: length of an embedding of the language model.
        num_queries: latents, and so image tokens.
        num_layers: blocks of attention and feed-forward.

    Source: Alayrac et al. 2022, "Flamingo", section 3.1; parameter names as in the
    checkpoints that use it.
    """

    def __init__(
        self, vision_hidden_size: int, hidden_size: int, num_queries: int, num_layers: int
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, hidden_size)
        self.latents = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.layers = nn.ModuleList(
            nn.ModuleList([_LatentAttention(hidden_size), _feed_forward(hidden_size)])
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Maps [num_images, num_patches, vision_hidden_size] to [.., num_queries, hidden_size]."""
        media = self.linear(vision_features)
        latents = self.latents.unsqueeze(0).expand(media.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = cast("nn.ModuleList", layer)
            latents = attention(media, latents) + latents
            latents = feed_forward(latents) + latents
        return cast("torch.Tensor", self.norm(latents))


class _LatentAttention(nn.Module):
    """8 heads of 64; keys and values come from the media and the latents together."""

    heads, head_dim = 8, 64

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = self.heads * self.head_dim
        self.norm_media = nn.LayerNorm(hidden_size)
        self.norm_latents = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        media, latents = self.norm_media(media), self.norm_latents(latents)
        query = self._split(self.to_q(latents))
        key, value = self.to_kv(torch.cat((media, latents), dim=1)).chunk(2, dim=-1)
        output = nn.functional.scaled_dot_product_attention(
            query, self._split(key), self._split(value)
        )
        merged = output.transpose(1, 2).flatten(2)
        return cast("torch.Tensor", self.to_out(merged))

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        shape = (*states.shape[:2], self.heads, self.head_dim)
        return states.reshape(shape).transpose(1, 2)


def _feed_forward(hidden_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(hidden_size),
        nn.Linear(hidden_size, 4 * hidden_size, bias=False),
        nn.GELU(),
        nn.Linear(4 * hidden_size, hidden_size, bias=False),
    )


def projector_module(
    build: Callable[[], nn.Module],
    vision_tokens: int,
    vision_hidden_size: int,
    image_tokens: int,
    hidden_size: int,
    *,
    towers: int = 1,
    scale: float | None = None,
) -> TracedModule:
    """The graph "projector" of a connector.

    Args:
        build: makes the connector; called under the meta device.
        vision_tokens: tokens an image has when it leaves a tower.
        vision_hidden_size: their length.
        image_tokens: tokens an image has in the language model.
        hidden_size: their length.
        towers: towers that the connector reads, one input each.
        scale: see `Projector`.
    """
    source = ("num_images", vision_tokens, vision_hidden_size)
    target = ("num_images", image_tokens, hidden_size)
    return TracedModule(
        name="projector",
        build=lambda: Projector(build(), scale),
        inputs=tuple(
            GraphPort(feature_name(index), torch.float32, source) for index in range(towers)
        ),
        outputs=(GraphPort("image_features", torch.float32, target),),
        single_inputs=towers,
    )


class _PatchProjector(nn.Module):
    """A linear layer that takes pixels, which come as float32 whatever its own element type is."""

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, image_patches: torch.Tensor) -> torch.Tensor:
        """Maps [num_patches, patch_length] to [num_patches, hidden_size]."""
        weight = cast("nn.Linear", self.connector).weight
        return cast("torch.Tensor", self.connector(image_patches.to(weight.dtype)))


def patch_projector_module(
    build: Callable[[], nn.Module], patch_length: int, hidden_size: int
) -> TracedModule:
    """The graph "projector" of a model without a vision tower.

    Args:
        build: makes the projector; called under the meta device.
        patch_length: values of one flattened patch.
        hidden_size: length of an embedding of the language model.
    """
    return TracedModule(
        name="projector",
        build=lambda: _PatchProjector(build()),
        inputs=(GraphPort("image_patches", torch.float32, ("num_patches", patch_length)),),
        outputs=(GraphPort("image_features", torch.float32, ("num_patches", hidden_size)),),
        single_inputs=1,
    )
