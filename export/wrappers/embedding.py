"""The token embedding as a graph of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vlmport.export.tracing import GraphPort, TracedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = ["TokenEmbedding", "embedding_module"]


class TokenEmbedding(nn.Module):
    """input_ids int64 [batch, sequence_length] -> inputs_embeds [batch, sequence_length, hidden].

    Args:
        language_model: a causal language model; only its input embedding is used.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Looks the ids up."""
        return cast("torch.Tensor", self.language_model.get_input_embeddings()(input_ids))


def embedding_module(build: Callable[[], PreTrainedModel], hidden_size: int) -> TracedModule:
    """The graph "embed_tokens" of a language model.

    Args:
        build: makes the causal language model; called under the meta device.
        hidden_size: length of an embedding.
    """
    tokens = ("batch", "sequence_length")
    return TracedModule(
        name="embed_tokens",
        build=lambda: TokenEmbedding(build()),
        inputs=(GraphPort("input_ids", torch.int64, tokens),),
        outputs=(GraphPort("inputs_embeds", torch.float32, (*tokens, hidden_size)),),
        single_inputs=1,
    )
