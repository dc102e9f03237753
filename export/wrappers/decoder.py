"""Any transformers causal language model as a decoder that writes its cache in place.

Two seams of transformers carry the whole form, with no change to its modelling code: a `Cache`
whose update is ONNX TensorScatter, and an attention function that is ONNX Attention with
`nonpad_kv_seqlen` and native grouped-query heads.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Call:
    """What the attention layers need to know of the forward pass that runs now.

    Attributes:
        write_indices: int64 [batch], cache row of each row's first new token.
        valid_lengths: int64 [batch], valid cache rows after this call.
        sequence_length: new tokens of a row.
        is_bidirectional: whether the prompt's tokens all see each other.
        max_length: most cache rows that a sequence may have.
    """

    write_indices: torch.Tensor
    valid_lengths: torch.Tensor
    sequence_length: int
    is_bidirectional: bool
    max_length: int


# Not an argument, because not all models hand unknown arguments on to their attention (StableLM).
_CALL: ContextVar[_Call] = ContextVar("call")


class InPlaceDecoder(nn.Module):
    """inputs_embeds and a cache -> logits of each row's last valid token, and the same cache.

    Shapes: batch rows, sequence_length new tokens a row (right-padded), capacity cache rows.

    Args:
        language_model: a causal language model whose config names `ATTENTION`.
        is_bidirectional: whether the first call, with the whole prompt, lets all of its tokens see
            each other. Later calls have one new token each.
    """

    def __init__(self, language_model: PreTrainedModel, *, is_bidirectional: bool = False) -> None:
        super().__init__()
        self.language_model = language_model
        self._is_bidirectional = is_bidirectional

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
            inputs_embeds: [batch, sequence_length, hidden_size], in the model's own dtype.
            position_ids: int64 [batch, sequence_length].
            write_indices: int64 [batch], cache row of each row's first new token.
            valid_lengths: int64 [batch], valid cache rows after this call. The new tokens beyond
                them are padding: their cache rows are overwritten by the next call.
            past_key_values: key and value of each layer in turn, in the model's own dtype
                [batch, num_kv_heads, capacity, head_dim].

        Returns:
            logits float32 [batch, vocab_size], then the updated cache tensors in the same order.
        """
        config = cast("Any", self.language_model).config
        _CALL.set(
            _Call(
                write_indices,
                valid_lengths,
                inputs_embeds.shape[1],
                self._is_bidirectional,
                config.max_position_embeddings,
            )
        )
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
        # Gemma 2, section 2 of its report: outside the base model, in the class with the head.
        if limit := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / limit) * limit
        return (logits.float(), *cache.present(len(past_key_values)))


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
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One attention layer of transformers, as one ONNX Attention over the whole cache."""
    del kwargs
    if attention_mask is not None:
        msg = (
            f"decoder: {type(module).__name__} calls its attention with a mask; only the masks "
            "that follow from the cache can be exported"
        )
        raise ExportError(msg)
    call = _CALL.get()
    attributes: dict[str, Any] = {  # torch's own type of a value is a union of eight
        "scale": query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    }
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    mask = lengths = None
    if sliding_window is not None and sliding_window < call.max_length:
        mask = _window_mask(call, key.shape[2], sliding_window)
    elif call.is_bidirectional:
        # A single new token sees all of the cache, so that generated tokens are causal.
        lengths = call.valid_lengths
    else:
        # A causal Attention aligns the mask to the end of nonpad_kv_seqlen. Counting the padding
        # too keeps every valid token's row of the mask right, in ragged batches as well; with the
        # true lengths short rows are wrong (kernel study, error 5.0 against 2.6e-6).
        attributes["is_causal"] = 1
        lengths = call.write_indices + call.sequence_length
    output = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask, None, None, lengths),
        attributes,
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[-1]),
        version=OPSET,
    )
    return output.transpose(1, 2), None


def _window_mask(call: _Call, capacity: int, window: int) -> torch.Tensor:
    """Which cache rows each new token sees: bool [batch, 1, sequence_length, capacity].

    A token sees itself and the `window` - 1 rows before it; in a bidirectional prompt, which is the
    call that begins at row 0, it sees the whole prompt.

    Source: transformers/masking_utils.py, create_sliding_window_causal_mask.
    """
    row = torch.arange(capacity)[None, None, :]
    token = call.write_indices[:, None] + torch.arange(call.sequence_length)[None, :]
    seen = (row <= token[:, :, None]) & (row > token[:, :, None] - window)
    if call.is_bidirectional:
        is_prompt = (call.write_indices == 0)[:, None, None]
        seen = seen | (is_prompt & (row < call.valid_lengths[:, None, None]))
    return seen[:, None]


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
    build: Callable[[], PreTrainedModel],
    config: PretrainedConfig,
    vocab_size: int,
    *,
    is_bidirectional: bool = False,
) -> TracedModule:
    """The decoder graph of a language model.

    Args:
        build: makes the causal language model; called under the meta device.
        config: the language model's config.
        vocab_size: rows of the output head.
        is_bidirectional: see `InPlaceDecoder`.
    """
    layout = kv_layout(config)
    shape = ("batch", layout.num_kv_heads, "capacity", layout.head_dim)
    names = [f"{i}.{part}" for i in range(layout.num_layers) for part in ("key", "value")]
    past = [GraphPort(f"past_key_values.{name}", torch.float32, shape) for name in names]
    present = [GraphPort(f"present_key_values.{name}", torch.float32, shape) for name in names]
    tokens = ("batch", "sequence_length")
    return TracedModule(
        name="decoder",
        build=lambda: InPlaceDecoder(build(), is_bidirectional=is_bidirectional),
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
