"""A vision tower for pictures of any size, and a connector that knows which patches are padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vlmport.export.tracing import GraphPort, TracedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

__all__ = ["MaskedResampler", "NativeSizeTower", "masked_projector_module", "native_tower_module"]


class NativeSizeTower(nn.Module):
    """pixel_values and patch_counts -> vision_features and patch_mask.

    Positions are fractions of a tile's own height and width, looked up on the grid of positions
    that the tower was first trained with.

    Args:
        vision_tower: has `embeddings.patch_embedding`, `embeddings.position_embedding`,
            `encoder.layers` and `post_layernorm`.

    Source: Dehghani et al. 2023, "Patch n' Pack: NaViT", section 2.1 (fractional positions);
    the released models' own code looks positions up in the same way.
    """

    def __init__(self, vision_tower: nn.Module) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        side: int = cast("Any", vision_tower).embeddings.num_patches_per_side
        # transformers makes them in the same way on the CPU, so both sides hold the same bits.
        bounds = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device="cpu")
        self.register_buffer("bounds", bounds, persistent=False)
        self._side = side

    def forward(
        self, pixel_values: torch.Tensor, patch_counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes tiles.

        Args:
            pixel_values: float32 [num_tiles, 3, height, width], padded at the bottom and the right.
            patch_counts: int64 [num_tiles, 2], rows and columns of patches without padding.

        Returns:
            vision_features float32 [num_tiles, num_patches, vision_hidden_size], and patch_mask
            bool [num_tiles, num_patches], False at padding.
        """
        tower = cast("Any", self.vision_tower)
        patches: torch.Tensor = tower.embeddings.patch_embedding(pixel_values.to(tower.dtype))
        row, is_row = self._axis(patches.shape[2], patch_counts[:, 0])
        column, is_column = self._axis(patches.shape[3], patch_counts[:, 1])
        grid = is_row[:, :, None] & is_column[:, None, :]
        # Padded patches have position 0, as in transformers.
        position = (row[:, :, None] * self._side + column[:, None, :]) * grid
        position_ids, mask = position.flatten(1), grid.flatten(1)
        hidden = patches.flatten(2).transpose(1, 2)
        hidden = hidden + tower.embeddings.position_embedding(position_ids)
        # One row for every query: ONNX Runtime refuses a mask that is broadcast along them.
        attention_mask = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, attention_mask)
        return tower.post_layernorm(hidden), mask

    def _axis(self, length: int, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(index on the trained grid, whether it is no padding) of each patch along one axis.

        transformers' bucketize(right=True) counts the bounds that are not above the fraction.
        """
        index = torch.arange(length)
        # Not `1.0 / counts`: its ONNX form is Reciprocal, which need not round as a division does.
        step = torch.div(torch.ones_like(counts, dtype=torch.float32), counts)
        fraction = (index.to(torch.float32)[None, :] * step[:, None]).clamp(max=1.0 - 1e-6)
        bounds = cast("torch.Tensor", self.bounds)
        if not len(bounds):  # a grid of one position; ONNX Runtime 1.31 drops a sum over nothing
            return torch.zeros_like(fraction, dtype=torch.int64), index[None, :] < counts[:, None]
        bucket = (fraction[:, :, None] >= bounds).sum(-1)
        return bucket, index[None, :] < counts[:, None]


class MaskedResampler(nn.Module):
    """A projection, then latents that see the patches that are no padding, and each other.

    Args:
        connector: has `modality_projection` and `perceiver_resampler` (`latents`, `layers`,
            `norm`).

    Source: Jaegle et al. 2021, "Perceiver"; Alayrac et al. 2022, "Flamingo", section 3.1.
    """

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, vision_features: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """Maps [num_tiles, num_patches, vision_hidden_size] to [num_tiles, num_latents, hidden]."""
        connector = cast("Any", self.connector)
        resampler = connector.perceiver_resampler
        context = connector.modality_projection(vision_features)
        latents = resampler.latents[None].expand(context.shape[0], -1, -1)
        seen = torch.cat((patch_mask, torch.ones(latents.shape[:2], dtype=torch.bool)), dim=1)
        # As in the tower, a row for every query; transformers leaves it to broadcasting.
        attention_mask = seen[:, None, None, :].expand(-1, 1, latents.shape[1], -1)
        for layer in resampler.layers:
            latents = layer(latents, context, attention_mask=attention_mask)
        return cast("torch.Tensor", resampler.norm(latents))


def native_tower_module(build: Callable[[], nn.Module], config: PretrainedConfig) -> TracedModule:
    """The graph "vision_encoder" of a tower for pictures of any size.

    Args:
        build: makes the tower; called under the meta device.
        config: the tower's config.
    """
    pixels = GraphPort("pixel_values", torch.float32, ("num_tiles", 3, "height", "width"))
    counts = GraphPort("patch_counts", torch.int64, ("num_tiles", 2))
    return TracedModule(
        name="vision_encoder",
        build=lambda: NativeSizeTower(build()),
        inputs=(pixels, counts),
        outputs=_vision_ports(config.hidden_size),
        single_inputs=2,
    )


def masked_projector_module(
    build: Callable[[], nn.Module], vision_hidden_size: int, num_latents: int, hidden_size: int
) -> TracedModule:
    """The graph "projector" of a connector that turns any number of patches into latents.

    Args:
        build: makes the connector; called under the meta device.
        vision_hidden_size: length of a vision feature.
        num_latents: image tokens of one tile.
        hidden_size: length of an embedding of the language model.
    """
    shape = ("num_tiles", num_latents, hidden_size)
    return TracedModule(
        name="projector",
        build=lambda: MaskedResampler(build()),
        inputs=_vision_ports(vision_hidden_size),
        outputs=(GraphPort("image_features", torch.float32, shape),),
        single_inputs=2,
    )


def _vision_ports(hidden_size: int) -> tuple[GraphPort, GraphPort]:
    patches = ("num_tiles", "num_patches")
    return (
        GraphPort("vision_features", torch.float32, (*patches, hidden_size)),
        GraphPort("patch_mask", torch.bool, patches),
    )
