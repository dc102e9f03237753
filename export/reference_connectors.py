"""Connectors of the PyTorch reference that transformers has no class for.

They are put together from transformers' own modules, or written in another way than the connectors
that are traced, so that a fault of one is not in the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn

from vlmport.export.split_reference import load_module
from vlmport.export.wrappers.query_transformer import HEAD_DIM, NORM_EPSILON

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.export.tensor_store import TensorStore
    from vlmport.export.wrappers.query_transformer import QueryTransformerSizes

__all__ = ["ReferenceInterleavedMlps", "ReferenceQueryTransformer", "load_query_transformer"]


class ReferenceQueryTransformer(nn.Module):
    """Learned queries through the Q-Former of BLIP-2, and a linear layer.

    Args:
        vision_hidden_size: length of a vision feature.
        hidden_size: length of an embedding of the language model.
        num_queries: queries.
        sizes: of the transformer.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        hidden_size: int,
        num_queries: int,
        sizes: QueryTransformerSizes,
    ) -> None:
        super().__init__()
        config: Any = transformers.Blip2QFormerConfig(
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.hidden // HEAD_DIM,
            intermediate_size=sizes.intermediate,
            hidden_act="gelu",
            layer_norm_eps=NORM_EPSILON,
            cross_attention_frequency=2,
            encoder_hidden_size=vision_hidden_size,
            use_qformer_text_input=False,
        )
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, sizes.hidden))
        # Its first normalization keeps the weight 1 and bias 0 that it is built with.
        self.bert = transformers.Blip2QFormerModel(config)
        self.projector = nn.Linear(sizes.hidden, hidden_size)

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Maps [num_images, num_patches, vision_hidden_size] to [.., num_queries, hidden_size]."""
        queries = self.query_tokens.expand(vision_features.shape[0], -1, -1)
        seen = torch.ones(vision_features.shape[:2], dtype=torch.long)
        output = cast("Any", self.bert)(
            query_embeds=queries, encoder_hidden_states=vision_features, encoder_attention_mask=seen
        )
        return cast("torch.Tensor", self.projector(output.last_hidden_state))


def load_query_transformer(
    build: Callable[[], ReferenceQueryTransformer],
    prefix: str,
    store: TensorStore,
    dtype: torch.dtype,
) -> ReferenceQueryTransformer:
    """Builds the module and gives it its weights, whose names are those of the original BERT.

    Args:
        build: makes the module.
        prefix: what the store's names begin with.
        store: tensors of the checkpoint.
        dtype: element type of the module.
    """

    def stored_name(name: str) -> str:
        return name.replace("attention.attention.", "attention.self.")

    return load_module(build, prefix, store, dtype, stored_name)


class ReferenceInterleavedMlps(nn.Module):
    """An MLP for each of two towers, their tokens written to even and odd places.

    Args:
        vision_hidden_size: length of a vision feature of either tower.
        hidden_size: length of an embedding of the language model.
    """

    def __init__(self, vision_hidden_size: int, hidden_size: int) -> None:
        super().__init__()
        self.clip, self.dinov2 = (
            nn.Sequential(
                nn.Linear(vision_hidden_size, hidden_size),
                nn.GELU(),
                nn.Linear(hidden_size, hidden_size),
            )
            for _ in range(2)
        )

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Maps twice [num_images, num_patches, vision_hidden_size] to [.., 2 num_patches, hidden].

        Places 0, 2, 4, ... hold the first tower's tokens.
        """
        even, odd = self.clip(first), self.dinov2(second)
        merged: torch.Tensor = even.new_zeros(
            even.shape[0], even.shape[1] + odd.shape[1], even.shape[2]
        )
        merged[:, 0::2] = even
        merged[:, 1::2] = odd
        return merged
