"""A connector of learned queries that read the image's tokens through a BERT-like transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmport.export.tensor_store import WeightFile

__all__ = ["HEAD_DIM", "NORM_EPSILON", "QueryTransformer", "QueryTransformerSizes"]

# Of BERT, whose sizes in all of its released versions have heads of 64.
HEAD_DIM = 64
NORM_EPSILON = 1e-12
# Blocks 0, 2, 4, ... read the image; the others let the queries see each other alone.
_READS_IMAGE_EVERY = 2


class QueryTransformerSizes:
    """Sizes that a config does not tell, read from the shapes of a checkpoint's tensors.

    Args:
        found: tensors under parameter names, as `weight_match.collect_tensors` gives them.
        prefix: what the connector's names begin with.

    Attributes:
        hidden: length of a query.
        intermediate: length of a feed-forward's inner layer.
        layers: blocks.
    """

    # bert-base-uncased, for tensors that are missing: the matching of weights reports them.
    hidden, intermediate, layers = 768, 3072, 12

    def __init__(self, found: Mapping[str, tuple[WeightFile, str]], prefix: str) -> None:
        shapes = {
            name.removeprefix(prefix): file.tensors[key].shape
            for name, (file, key) in found.items()
            if name.startswith(prefix)
        }
        blocks = [name.split(".")[3] for name in shapes if name.startswith("bert.encoder.layer.")]
        self.layers = 1 + max(map(int, blocks)) if blocks else self.layers
        first = shapes.get("bert.encoder.layer.0.intermediate_query.dense.weight", ())
        if len(first) == 2 and first[1] % HEAD_DIM == 0:
            self.intermediate, self.hidden = first


class QueryTransformer(nn.Module):
    """A fixed number of queries becomes as many image tokens.

    Args:
        vision_hidden_size: length of a vision feature.
        hidden_size: length of an embedding of the language model.
        num_queries: queries, and so image tokens.
        sizes: of the transformer.

    Source: Li et al. 2023, "BLIP-2", section 3.1; parameter names as in the checkpoints that use
    it, which have neither BERT's embeddings nor its feed-forward for text.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        hidden_size: int,
        num_queries: int,
        sizes: QueryTransformerSizes,
    ) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, sizes.hidden))
        self.bert = nn.Module()
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            _Block(sizes, vision_hidden_size if index % _READS_IMAGE_EVERY == 0 else None)
            for index in range(sizes.layers)
        )
        self.projector = nn.Linear(sizes.hidden, hidden_size)

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Maps [num_images, num_patches, vision_hidden_size] to [.., num_queries, hidden_size]."""
        # BERT's first normalization is there without its weight and bias.
        queries = nn.functional.layer_norm(
            self.query_tokens, self.query_tokens.shape[-1:], eps=NORM_EPSILON
        )
        hidden = queries.expand(vision_features.shape[0], -1, -1)
        for block in cast("nn.ModuleList", cast("nn.Module", self.bert.encoder).layer):
            hidden = block(hidden, vision_features)
        return cast("torch.Tensor", self.projector(hidden))


class _Block(nn.Module):
    """Queries see each other, then the image if the block reads it, then a feed-forward."""

    def __init__(self, sizes: QueryTransformerSizes, image_hidden: int | None) -> None:
        super().__init__()
        self.attention = _Attention(sizes.hidden, sizes.hidden)
        self.crossattention = (
            None if image_hidden is None else _Attention(sizes.hidden, image_hidden)
        )
        self.intermediate_query = nn.ModuleDict(
            {"dense": nn.Linear(sizes.hidden, sizes.intermediate)}
        )
        self.output_query = _dense_and_norm(sizes.intermediate, sizes.hidden)

    def forward(self, hidden: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        hidden = self.attention(hidden, hidden)
        if self.crossattention is not None:
            hidden = self.crossattention(hidden, image)
        inner = nn.functional.gelu(self.intermediate_query["dense"](hidden))
        return _added(self.output_query, inner, hidden)


class _Attention(nn.Module):
    """Multi-head attention, added to its queries and normalized."""

    def __init__(self, hidden: int, source_hidden: int) -> None:
        super().__init__()
        lengths = {"query": hidden, "key": source_hidden, "value": source_hidden}
        projections = {name: nn.Linear(length, hidden) for name, length in lengths.items()}
        self.add_module("self", nn.ModuleDict(projections))
        self.output = _dense_and_norm(hidden, hidden)

    def forward(self, hidden: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        projections = cast("nn.ModuleDict", getattr(self, "self"))  # noqa: B009, the stored name
        query = _heads(projections["query"](hidden))
        key, value = (_heads(projections[name](source)) for name in ("key", "value"))
        read = nn.functional.scaled_dot_product_attention(query, key, value)
        return _added(self.output, read.transpose(1, 2).flatten(2), hidden)


def _dense_and_norm(inputs: int, outputs: int) -> nn.ModuleDict:
    norm = nn.LayerNorm(outputs, eps=NORM_EPSILON)
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs), "LayerNorm": norm})


def _added(output: nn.ModuleDict, inner: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return cast("torch.Tensor", output["LayerNorm"](output["dense"](inner) + residual))


def _heads(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(*states.shape[:2], -1, HEAD_DIM).transpose(1, 2)
