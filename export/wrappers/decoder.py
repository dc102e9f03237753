"""Any transformers causal language model as a decoder that writes its cache in place.

Two seams of transformers carry the whole form, with no change to its modelling code: a `Cache`
whose update is ONNX TensorScatter, and an attention function that is ONNX Attention with
`nonpad_kv_seqlen` and native grouped-query heads.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmport.contract import KVLayout
from vlmport.errors import ExportError
from vlmport.export.tracing import OPSET, GraphPort, TracedModule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["ATTENTION", "InPlaceDecoder", "decoder_module", "in_place_attention", "kv_layout"]

# Name under which the attention function is registered with transformers during a trace.
ATTENTION = "vlmport_in_place"
# How many cache rows each row attends to, int64 [batch], for the forward pass that runs now. Not
# an argument, because not all models hand unknown arguments on to their attention (StableLM).
_CACHE_LENGTHS: ContextVar[torch.Tensor] = ContextVar("cache_lengths")


class InPlaceDecoder(nn.Module):
    """inputs_embeds and a cache -> logits of each row's last valid token, and the same cache.

    Shapes: batch rows, sequence_length new tokens a row (right-padded), capacity cache rows.

    Args:
        language_model: a causal language model whose config names `ATTENTION`.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        write_indices: torch.Tensor,
        valid_lengths: torch.Tensor,
        past_key_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Runs the model over the new tokens.

        Args:
            inputs_embeds: float32 [batch, sequence_length, hidden_size].
            position_ids: int64 [batch, sequence_length].
            write_indices: int64 [batch], cache row of each row's first new token.
            valid_lengths: int64 [batch], valid cache rows after this call. The new tokens beyond
                them are padding: their cache rows are overwritten by the next call.
            past_key_values: key and value of each layer in turn, float32
                [batch, num_kv_heads, capacity, head_dim].

        Returns:
            logits float32 [batch, vocab_size], then the updated cache tensors in the same order.
        """
        # A causal Attention aligns the mask to the end of nonpad_kv_seqlen. Counting the padding
        # too keeps every valid token's row of the mask right, in ragged batches as well; with the
        # true lengths short rows are wrong (kernel study, error 5.0 against 2.6e-6).
        _CACHE_LENGTHS.set(write_indices + inputs_embeds.shape[1])
        cache = _InPlaceCache(past_key_values, write_indices)
        body = cast("Any", self.language_model).base_model
        hidden = body(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last = (valid_lengths - write_indices - 1)[:, None, None]
        index = last.expand(-1, 1, hidden.shape[2])
        last_hidden = torch.gather(hidden, 1, index).squeeze(1)
        logits = cast("nn.Module", self.language_model.get_output_embeddings())(last_hidden)
        return (logits, *cache.present(len(past_key_values)))


class _InPlaceCache(Cache):
    """Writes new keys and values into the rows at write_indices (ONNX TensorScatter, opset 24)."""

    def __init__(self, past: list[torch.Tensor], write_indices: torch.Tensor) -> None:
        super().__init__(layers=[])
        self._past = past
        self._write_indices = write_indices
        self._present: dict[int, torch.Tensor] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by every attention layer; returns the whole cache of the layer."""
        del args, kwargs
        key = self._scatter(2 * layer_idx, key_states)
        value = self._scatter(2 * layer_idx + 1, value_states)
        return key, value

    def present(self, count: int) -> list[torch.Tensor]:
        """The updated tensors in the order of the past ones."""
        missing = [index for index in range(count) if index not in self._present]
        if missing:
            msg = (
                f"decoder: cache tensors {missing} are never written; the language model's "
                "attention does not use transformers' cache interface and cannot be exported"
            )
            raise ExportError(msg)
        return [self._present[index] for index in range(count)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions are inputs of the graph."""
        del layer_idx
        return 0

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Unused sizes: no mask is built."""
        del args, kwargs
        return 1, 0

    def _scatter(self, index: int, new: torch.Tensor) -> torch.Tensor:
        past = self._past[index]
        self._present[index] = torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new, self._write_indices),
            {"axis": 2},
            dtype=past.dtype,
            shape=past.shape,
            version=OPSET,
        )
        return self._present[index]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One attention layer of transformers, as one ONNX Attention over the whole cache."""
    del kwargs
    if attention_mask is not None or sliding_window is not None:
        found = "a mask" if attention_mask is not None else f"sliding_window={sliding_window}"
        msg = (
            f"decoder: {type(module).__name__} calls its attention with {found}; only plain "
            "causal attention over the in-place cache can be exported"
        )
        raise ExportError(msg)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    output = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, None, None, None, _CACHE_LENGTHS.get()),
        {"is_causal": 1, "scale": scale},
        dtype=query.dtype,
        shape=query.shape,
        version=OPSET,
    )
    return output.transpose(1, 2), None


@contextlib.contextmanager
def in_place_attention() -> Iterator[None]:
    """Registers the attention function with transformers for the time of a trace."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *_, **__: None)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(ATTENTION, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(ATTENTION, None)


def kv_layout(config: PretrainedConfig) -> KVLayout:
    """The cache's form for a language model's config."""
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return KVLayout(config.num_hidden_layers, kv_heads, head_dim, "float32")


def decoder_module(
    build: Callable[[], PreTrainedModel], config: PretrainedConfig, vocab_size: int
) -> TracedModule:
    """The decoder graph of a language model.

    Args:
        build: makes the causal language model; called under the meta device.
        config: the language model's config.
        vocab_size: rows of the output head.
    """
    layout = kv_layout(config)
    shape = ("batch", layout.num_kv_heads, "capacity", layout.head_dim)
    names = [f"{i}.{part}" for i in range(layout.num_layers) for part in ("key", "value")]
    past = [GraphPort(f"past_key_values.{name}", torch.float32, shape) for name in names]
    present = [GraphPort(f"present_key_values.{name}", torch.float32, shape) for name in names]
    tokens = ("batch", "sequence_length")
    return TracedModule(
        name="decoder",
        build=lambda: InPlaceDecoder(build()),
        inputs=(
            GraphPort("inputs_embeds", torch.float32, (*tokens, config.hidden_size)),
            GraphPort("position_ids", torch.int64, tokens),
            GraphPort("write_indices", torch.int64, ("batch",)),
            GraphPort("valid_lengths", torch.int64, ("batch",)),
            *past,
        ),
        outputs=(GraphPort("logits", torch.float32, ("batch", vocab_size)), *present),
        single_inputs=4,
    )
