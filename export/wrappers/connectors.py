"""Connectors between a vision tower and a language model, with their checkpoints' own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vlmport.export.tracing import GraphPort, TracedModule

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "PerceiverResampler",
    "Projector",
    "mlp_connector",
    "patch_projector_module",
    "projector_module",
]


class Projector(nn.Module):
    """Gives a connector the parameter prefix "connector.".

    Args:
        connector: vision_features -> image_features.
    """

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Maps [num_images, num_patches, vision_hidden_size] to [.., num_image_tokens, hidden]."""
        return cast("torch.Tensor", self.connector(vision_features))


def mlp_connector(
    vision_hidden_size: int, hidden_size: int, depth: int, *, bias: bool = True
) -> nn.Sequential:
    """Linear, then (GELU, Linear) until there are `depth` Linears ("mlp2x_gelu" has depth 2)."""
    layers: list[nn.Module] = [nn.Linear(vision_hidden_size, hidden_size, bias=bias)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size, bias=bias)]
    return nn.Sequential(*layers)


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
) -> TracedModule:
    """The graph "projector" of a connector.

    Args:
        build: makes the connector; called under the meta device.
        vision_tokens: tokens an image has when it leaves the tower.
        vision_hidden_size: their length.
        image_tokens: tokens an image has in the language model.
        hidden_size: their length.
    """
    source = ("num_images", vision_tokens, vision_hidden_size)
    target = ("num_images", image_tokens, hidden_size)
    return TracedModule(
        name="projector",
        build=lambda: Projector(build()),
        inputs=(GraphPort("vision_features", torch.float32, source),),
        outputs=(GraphPort("image_features", torch.float32, target),),
        single_inputs=1,
    )


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
        build=lambda: Projector(build()),
        inputs=(GraphPort("image_patches", torch.float32, ("num_patches", patch_length)),),
        outputs=(GraphPort("image_features", torch.float32, ("num_patches", hidden_size)),),
        single_inputs=1,
    )
