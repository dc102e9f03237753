"""A vision tower and a resampler for pictures of any size, several of them padded to one size.

Which patches are padding follows from each tile's rows and columns of whole patches: padding lies
at the bottom and the right. Such patches are never attended to, so that they change no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vlmport.export.tracing import GraphPort, TracedModule

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MaskedResampler", "NativeSizeTower", "native_tower_module", "resampler_module"]

# The tracer must see lengths that nothing else has; a picture of 5 x 7 patches and a rest.
_TILES, _ROWS, _COLUMNS, _PATCHES = 3, 5, 7, 11


class NativeSizeTower(nn.Module):
    """Runs a tower whose position embedding is looked up by the fraction of the picture.

    Args:
        tower: has embeddings (patch_embedding, position_embedding, num_patches_per_side), encoder
            and post_layernorm; its config names an attention function that takes a mask.

    Source: Dehghani et al. 2023, "Patch n' Pack: NaViT", section 2.1 (fractional embeddings).
    """

    boundaries: torch.Tensor

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_tower = tower
        side: int = cast("Any", tower).embeddings.num_patches_per_side
        # By the expression of transformers, so that every boundary is rounded as there.
        boundaries = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device="cpu")
        self.register_buffer("boundaries", boundaries, persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, patch_grid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs all layers and the final norm.

        Args:
            pixel_values: float32 [num_tiles, 3, height, width].
            patch_grid: int64 [num_tiles, 2], rows and columns of whole patches of each tile.

        Returns:
            vision_features float32 [num_tiles, num_patches, hidden_size]; patch_attention_mask
            bool [num_tiles, num_patches], False at padding.
        """
        tower = cast("Any", self.vision_tower)
        patches = tower.embeddings.patch_embedding(pixel_values)
        row, row_bucket = self._places(patch_grid[:, 0:1], patches.shape[2])
        column, column_bucket = self._places(patch_grid[:, 1:2], patches.shape[3])
        mask = (row[:, :, None] & column[:, None, :]).flatten(1)
        side = tower.embeddings.num_patches_per_side
        position_ids = (row_bucket[:, :, None] * side + column_bucket[:, None, :]).flatten(1)
        position_ids = position_ids * mask.to(torch.int64)
        hidden = patches.flatten(2).transpose(1, 2)
        hidden = hidden + tower.embeddings.position_embedding(position_ids)
        # ONNX Runtime 1.31 does not repeat a mask along the queries: every query gets its row.
        seen = mask[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=seen).last_hidden_state
        return tower.post_layernorm(hidden), mask

    def _places(self, valid: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each place of an axis is no padding, and its bucket of position ids.

        Args:
            valid: int64 [num_tiles, 1], places of the axis that are no padding.
            length: places of the axis.

        Returns:
            bool [num_tiles, length] and int64 [num_tiles, length].
        """
        place = torch.arange(length)[None, :]
        count = valid.to(torch.float32)
        # Not `1.0 / count`, whose ONNX form is Reciprocal: it need not round as a division does.
        step = torch.div(torch.ones_like(count), count)
        fraction = torch.clamp(place.to(torch.float32) * step, max=1.0 - 1e-6)
        # What torch.bucketize(right=True) gives, which has no ONNX operator.
        bucket = (fraction[:, :, None] >= self.boundaries).to(torch.int64).sum(-1)
        return place < valid, bucket


class MaskedResampler(nn.Module):
    """A projection and a perceiver resampler whose latents attend to real patches and themselves.

    Args:
        connector: has modality_projection and perceiver_resampler (latents, layers, norm); the
            config of the latter names an attention function that takes a mask.

    Source: Jaegle et al. 2021, "Perceiver"; Alayrac et al. 2022, "Flamingo", section 3.1.
    """

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(
        self, vision_features: torch.Tensor, patch_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Maps a tile's patches to a fixed number of image tokens.

        Args:
            vision_features: float32 [num_tiles, num_patches, vision_hidden_size].
            patch_attention_mask: bool [num_tiles, num_patches], False at padding.

        Returns:
            float32 [num_tiles, num_latents, hidden_size].
        """
        connector = cast("Any", self.connector)
        resampler = connector.perceiver_resampler
        context = connector.modality_projection(vision_features)
        latents = resampler.latents[None].expand(context.shape[0], -1, -1)
        own = torch.ones(latents.shape[:2], dtype=torch.bool)
        mask = torch.cat((patch_attention_mask, own), dim=1)
        seen = mask[:, None, None, :].expand(-1, 1, latents.shape[1], -1)
        for layer in resampler.layers:
            latents = layer(latents, context, attention_mask=seen)
        return cast("torch.Tensor", resampler.norm(latents))


def native_tower_module(
    build: Callable[[], nn.Module], patch_size: int, hidden_size: int
) -> TracedModule:
    """The graph "vision_encoder" of a tower for pictures of any size.

    Args:
        build: makes the tower; called under the meta device.
        patch_size: pixels of a patch's side.
        hidden_size: length of a vision feature.
    """
    pixels = ("num_tiles", 3, "height", "width")
    return TracedModule(
        name="vision_encoder",
        build=lambda: NativeSizeTower(build()),
        inputs=(
            GraphPort("pixel_values", torch.float32, pixels),
            GraphPort("patch_grid", torch.int64, ("num_tiles", 2)),
        ),
        outputs=(
            GraphPort("vision_features", torch.float32, ("num_tiles", "num_patches", hidden_size)),
            GraphPort("patch_attention_mask", torch.bool, ("num_tiles", "num_patches")),
        ),
        single_inputs=2,
        sample_lengths={
            "num_tiles": _TILES,
            "height": _ROWS * patch_size + 1,
            "width": _COLUMNS * patch_size + 1,
        },
    )


def resampler_module(
    build: Callable[[], nn.Module], vision_hidden_size: int, num_latents: int, hidden_size: int
) -> TracedModule:
    """The graph "projector" of a connector with a resampler.

    Args:
        build: makes the connector; called under the meta device.
        vision_hidden_size: length of a vision feature.
        num_latents: image tokens of a tile.
        hidden_size: length of an embedding of the language model.
    """
    patches = ("num_tiles", "num_patches")
    return TracedModule(
        name="projector",
        build=lambda: MaskedResampler(build()),
        inputs=(
            GraphPort("vision_features", torch.float32, (*patches, vision_hidden_size)),
            GraphPort("patch_attention_mask", torch.bool, patches),
        ),
        outputs=(
            GraphPort("image_features", torch.float32, ("num_tiles", num_latents, hidden_size)),
        ),
        single_inputs=2,
        sample_lengths={"num_tiles": _TILES, "num_patches": _PATCHES},
    )
