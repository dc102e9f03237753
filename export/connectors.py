"""Chooses the connector that a checkpoint's config names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from vlmport.errors import CheckpointError, close_matches
from vlmport.export.reference_connectors import (
    ReferenceInterleavedMlps,
    ReferenceQueryTransformer,
    load_query_transformer,
)
from vlmport.export.split_reference import load_module
from vlmport.export.wrappers.connectors import InterleavedMlps, PerceiverResampler, mlp_connector
from vlmport.export.wrappers.query_transformer import QueryTransformer, QueryTransformerSizes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from vlmport.export.checkpoint import Checkpoint
    from vlmport.export.tensor_store import TensorStore, WeightFile

__all__ = ["INTERLEAVED", "Connector", "choose_connector"]

# The kind that reads two towers.
INTERLEAVED = "mof_mlp"
_KINDS = ("identity", "linear", "mlp2x_gelu", "mlp3x_gelu", INTERLEAVED, "qformer", "resampler")
_PREFIX = "connector."


@dataclass(frozen=True, slots=True)
class Connector:
    """A connector that a checkpoint asks for.

    Attributes:
        build: makes the module that is traced; runs under the meta device too.
        tokens: image tokens that it gives; None for as many as come in.
        reference: makes the PyTorch reference's module, with its weights.
    """

    build: Callable[[], nn.Module]
    tokens: int | None
    reference: Callable[[TensorStore, torch.dtype], nn.Module]


def choose_connector(
    checkpoint: Checkpoint,
    kind: str,
    lengths: tuple[int, int],
    vision_tokens: int,
    found: Mapping[str, tuple[WeightFile, str]],
) -> Connector:
    """The connector of a kind.

    Args:
        checkpoint: its config has sizes of some kinds.
        kind: name in the config.
        lengths: of a vision feature and of an embedding of the language model.
        vision_tokens: tokens of one image and one tower.
        found: tensors under parameter names; sizes of some kinds are seen in them alone.

    Raises:
        CheckpointError: if there is no such kind, or it does not fit the lengths.
    """
    vision, hidden = lengths
    if kind == "identity":
        return _identity(checkpoint, vision, hidden)
    if kind == "linear":
        return _same(lambda: nn.Linear(vision, hidden), None)
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if depth:
        return _same(lambda: mlp_connector(vision, hidden, int(depth.group(1))), None)
    queries = int(checkpoint.config.get("num_queries") or 128)
    if kind == "resampler":
        layers = int(checkpoint.config.get("num_resampler_layers") or 3)
        return _same(lambda: PerceiverResampler(vision, hidden, queries, layers), queries)
    if kind == INTERLEAVED:
        mlps = partial(ReferenceInterleavedMlps, vision, hidden)
        return Connector(
            lambda: InterleavedMlps(vision, hidden),
            2 * vision_tokens,
            lambda store, dtype: load_module(mlps, _PREFIX, store, dtype),
        )
    if kind == "qformer":
        sizes = QueryTransformerSizes(found, _PREFIX)
        form = (vision, hidden, queries, sizes)
        original = partial(ReferenceQueryTransformer, *form)
        return Connector(
            lambda: QueryTransformer(*form),
            queries,
            lambda store, dtype: load_query_transformer(original, _PREFIX, store, dtype),
        )
    msg = (
        f"{checkpoint.path}/config.json: connector {kind!r} is not supported; "
        f"{close_matches(kind, _KINDS)}"
    )
    raise CheckpointError(msg)


def _identity(checkpoint: Checkpoint, vision: int, hidden: int) -> Connector:
    if vision != hidden:
        msg = (
            f"{checkpoint.path}/config.json: connector 'identity' between vision features of "
            f"length {vision} and embeddings of length {hidden}; expected equal lengths"
        )
        raise CheckpointError(msg)
    return _same(nn.Identity, None)


def _same(build: Callable[[], nn.Module], tokens: int | None) -> Connector:
    """A connector of plain torch layers, which the reference runs as they are."""
    return Connector(build, tokens, lambda store, dtype: load_module(build, _PREFIX, store, dtype))
