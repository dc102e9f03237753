"""How far a bundle may be from PyTorch: the one table that every parity verdict comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmport.errors import close_matches

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "INNER_TOLERANCES",
    "QUANTIZED_TOLERANCES",
    "TOLERANCES",
    "QuantizedTolerance",
    "Tolerance",
    "inner_tolerance",
    "near_tie_margin",
    "quantized_tolerances",
    "tolerance_for",
]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The greatest difference of one quantity at one precision.

    Attributes:
        quantity: "preprocessing", the name of a graph, or "logits" (the decoder's output).
        precision: element type of the bundle's computation.
        max_abs: limit of the largest |bundle - PyTorch|.
        mean_abs: limit of the mean |bundle - PyTorch|, or None for no limit of its own.
        basis: what the limits are: "absolute" differences, fractions of PyTorch's largest and mean
            "magnitude", or multiples of PyTorch's own "rounding": its largest and mean difference
            in this precision from float32, on the same input.
        reason: why these numbers.
    """

    quantity: str
    precision: str
    max_abs: float
    mean_abs: float | None
    basis: Literal["absolute", "magnitude", "rounding"]
    reason: str


# Measured for the relative rows: float32 against float64 in PyTorch, SigLIP towers of 2 to 24
# layers with and without planted outlier channels of 50 to 500, is off by 0.6e-7 to 7.3e-7 of the
# largest magnitude and 0.8e-7 to 5.5e-7 of the mean one, whatever the depth. ONNX Runtime 1.31
# against PyTorch 2.13: 2-layer SigLIP and CLIP towers up to 9.9e-7 and 6.0e-7; MLP connectors up
# to 2.9e-7 and 1.1e-7, a resampler 1.2e-6 and 6.4e-7.
_HIDDEN_STATES = (
    "un-normalised hidden states reach hundreds in trained towers, so an absolute limit would mean "
    "something else for every model. Rounding was measured at up to 1.0e-6 of the largest and "
    "6.0e-7 of the mean magnitude, independent of depth; the limits are 8 and 5 times that. The "
    "mean is limited as well because a few outlier channels set the largest magnitude and would "
    "hide an error in all the others; a wrong epsilon (1e-5 for 1e-6) shows at 4.5e-6 there"
)

_PIXELS = (
    "both sides resample with Pillow and then do the same float32 operations in the same order, so "
    "a single differing bit is a different operation"
)
_LOOKUP = (
    "a lookup copies rows of the weight, and a scale is one rounded product on both sides: there "
    "is nothing to sum, hence nothing that may differ"
)

# Measured for the half-precision rows, with E = PyTorch in half precision against PyTorch in
# float32, float16 in ONNX Runtime and bfloat16 emulated: eight random models of 2 layers (Llama,
# Phi, StableLM; SigLIP, CLIP; linear, MLP, resampler; two seeds), the trained checkpoint and
# SmolLM2-135M of 30 layers. Bundle against PyTorch in half precision: largest 0 to 1.8 E, mean of a
# stage 0 to 1.1 E. Bundle against float32: 0.3 to 1.6 E and 0.2 to 1.4 E. Linear connectors, one
# product with a bias, were seen at 2.2 E in bfloat16: PyTorch rounds once there, the graph twice.
_ROUNDED = (
    "half precision has no fixed error: it follows from a model's depth and magnitudes. PyTorch's "
    "own difference from float32 measures it on the very input, and two roundings of the same "
    "computation were measured to be at most 2.2 times that apart at the largest and 1.2 times in "
    "the mean; the limits are 4 and 2 times. An error below rounding cannot be seen here; the "
    "float32 bundle of the same checkpoint shows it"
)
_ROUNDED_LOGITS = (
    "as for the graphs before it, without a mean, which differs from step to step. Where PyTorch "
    "in float32 chooses another token at once, its rounding is known from one step: then the "
    "largest difference was up to 3.8 times that"
)

TOLERANCES = (
    Tolerance("preprocessing", "float32", 0.0, None, "absolute", _PIXELS),
    Tolerance("vision_encoder", "float32", 8e-6, 3e-6, "magnitude", _HIDDEN_STATES),
    Tolerance(
        quantity="projector",
        precision="float32",
        max_abs=8e-6,
        mean_abs=3e-6,
        basis="magnitude",
        reason="the scale of image features is the checkpoint's own, as for vision_encoder; "
        "measured at up to 1.2e-6 of the largest and 6.4e-7 of the mean magnitude",
    ),
    Tolerance("embed_tokens", "float32", 0.0, None, "absolute", _LOOKUP),
    Tolerance(
        quantity="logits",
        precision="float32",
        max_abs=1e-4,
        mean_abs=None,
        basis="absolute",
        reason="differences of logits are what softmax and argmax see, so the limit is absolute: "
        "1e-4 changes a probability by at most 0.02 % of itself. Small decoders were measured at "
        "7e-7 to 4.5e-6",
    ),
    Tolerance("preprocessing", "float16", 0.0, None, "absolute", _PIXELS),
    Tolerance("vision_encoder", "float16", 4.0, 2.0, "rounding", _ROUNDED),
    Tolerance("projector", "float16", 4.0, 2.0, "rounding", _ROUNDED),
    Tolerance("embed_tokens", "float16", 0.0, None, "absolute", _LOOKUP),
    Tolerance("logits", "float16", 4.0, None, "rounding", _ROUNDED_LOGITS),
    Tolerance("preprocessing", "bfloat16", 0.0, None, "absolute", _PIXELS),
    Tolerance("vision_encoder", "bfloat16", 4.0, 2.0, "rounding", _ROUNDED),
    Tolerance("projector", "bfloat16", 4.0, 2.0, "rounding", _ROUNDED),
    Tolerance("embed_tokens", "bfloat16", 0.0, None, "absolute", _LOOKUP),
    Tolerance("logits", "bfloat16", 4.0, None, "rounding", _ROUNDED_LOGITS),
)


# Of values inside of a graph, which is looked into only if its outputs are out of tolerance.
# Measured on all inner values of the four trained checkpoints in float32: ONNX Runtime with its
# optimizations beside ONNX Runtime without, up to 1.3e-6 of the largest and of the mean magnitude;
# beside itself with every weight moved by at most one unit in the last place, up to 3e-6, but for
# rotary angles, which move with their position (3e-5 at position 245).
_INNER = (
    "as for hidden states, which most of them are; other kernels were measured at up to 1.3e-6 of "
    "the magnitude on every inner value of four trained models"
)
INNER_TOLERANCES = (
    Tolerance("inner value", "float32", 8e-6, 3e-6, "magnitude", _INNER),
    Tolerance("inner value", "float16", 4.0, 2.0, "rounding", _ROUNDED),
    Tolerance("inner value", "bfloat16", 4.0, 2.0, "rounding", _ROUNDED),
)


def inner_tolerance(precision: str) -> Tolerance:
    """The row for a value inside of a graph that computes in a precision."""
    return next(row for row in INNER_TOLERANCES if row.precision == precision)


def tolerance_for(quantity: str, precision: str) -> Tolerance:
    """The row of the table for a quantity.

    Raises:
        ValueError: if the table has no such row.
    """
    for tolerance in TOLERANCES:
        if (tolerance.quantity, tolerance.precision) == (quantity, precision):
            return tolerance
    known = [f"{tolerance.quantity} {tolerance.precision}" for tolerance in TOLERANCES]
    hint = close_matches(f"{quantity} {precision}", known)
    msg = f"tolerance: found none for {quantity} {precision}; {hint}"
    raise ValueError(msg)


def near_tie_margin(logits_limit: float) -> float:
    """The largest gap of two reference logits that errors within tolerance can turn round.

    The upper logit may be too low by the tolerance and the lower one too high by as much, so twice
    the tolerance; a wider gap can only be bridged by a logit that is out of tolerance.

    Args:
        logits_limit: largest max_abs of the logits that passes.
    """
    return 2 * logits_limit


@dataclass(frozen=True, slots=True)
class QuantizedTolerance:
    """How far a bundle whose layers have integer weights may be from PyTorch in float32.

    Attributes:
        quantity: "kl_mean" (nats), "top1_agreement" (share of next tokens), "logits_snr"
            (decibels), "image_graph_snr" (decibels, of each graph before the decoder on PyTorch's
            input of it) or "layer_snr" (decibels without gains, of each layer beside the float
            bundle's).
        format: of the layers.
        limit: the greatest kl_mean that passes, the least of the others.
        reason: why this number.
    """

    quantity: Literal["kl_mean", "top1_agreement", "logits_snr", "image_graph_snr", "layer_snr"]
    format: str
    limit: float
    reason: str


# Measured with the built-in cases and quantizers of the plainest kind: round to nearest, min-max
# for activations; nothing is migrated or compensated. Worst of the four trained checkpoints, then
# SmolLM2-135M behind an untrained vision tower, which has to go on from pictures of noise:
#                        mean KL          other top-1    SNR in dB of
#                                                        logits    image graphs  layers
#   int8-weight-only     6.5e-4, 7.0e-3   2 %,  3 %      35, 30    35, 35        35, 21
#   int8                 7.6e-3, 0.75     8 %, 43 %      30, 4     31, 32        24, 2
#   int4, block 32       2.9e-2, 0.46     12 %, 33 %     15, 7     18, 15        17, 3.5
# The second of int8 is a model that min-max breaks, as it should be told. One layer's scales
# doubled (int8-weight-only): logits at 7 to 23 dB for all layers of the decoder but the
# head, there 0; an image graph at 0 to 11 dB for all layers before it.
_KL = (
    "what rounding weights costs the distributions of next tokens, whatever the size of the logits;"
    " it grows with the model's own doubt. Measured with the plainest quantizer at up to {} on "
    "trained checkpoints and {} on a language model that has to go on from noise"
)
_TOP1 = (
    "near ties of two tokens fall either way under rounding, and a comparison has few tokens: up to"
    " {} changed with the plainest quantizer. A lower share would be another model"
)
_LOGITS = (
    "does not hang on the model's doubt as the divergence does: {} dB or more were measured with "
    "the plainest quantizer, and 0 to 23 dB where one layer's scale is twice what it should be"
)
_GRAPH = (
    "the graphs before the decoder on PyTorch's own input: {} dB or more were measured with the "
    "plainest quantizer, 0 to 11 dB where one layer's scale is twice what it should be"
)
_LAYER = (
    "a layer of both bundles, each channel freed of its gain, which a quantizer may move into the "
    "next layer; {} dB or more were measured with the plainest quantizer, and 2 dB where it breaks "
    "a model. A gain that all channels share is a fault whatever the noise. Only with --against"
)

QUANTIZED_TOLERANCES = (
    QuantizedTolerance("kl_mean", "int8-weight-only", 0.02, _KL.format("6.5e-4", "7.0e-3")),
    QuantizedTolerance("top1_agreement", "int8-weight-only", 0.85, _TOP1.format("3 %")),
    QuantizedTolerance("logits_snr", "int8-weight-only", 24.0, _LOGITS.format(30)),
    QuantizedTolerance("image_graph_snr", "int8-weight-only", 22.0, _GRAPH.format(35)),
    QuantizedTolerance("layer_snr", "int8-weight-only", 12.0, _LAYER.format(21)),
    QuantizedTolerance("kl_mean", "int8", 0.2, _KL.format("7.6e-3", "(broken by min-max) 0.75")),
    QuantizedTolerance("top1_agreement", "int8", 0.75, _TOP1.format("8 %")),
    QuantizedTolerance("logits_snr", "int8", 10.0, _LOGITS.format(30)),
    QuantizedTolerance("image_graph_snr", "int8", 14.0, _GRAPH.format(31)),
    QuantizedTolerance("layer_snr", "int8", 3.0, _LAYER.format(24)),
    QuantizedTolerance("kl_mean", "int4", 1.0, _KL.format("2.9e-2", "0.46")),
    QuantizedTolerance("top1_agreement", "int4", 0.5, _TOP1.format("33 %")),
    QuantizedTolerance("logits_snr", "int4", 5.0, _LOGITS.format(7)),
    QuantizedTolerance("image_graph_snr", "int4", 11.0, _GRAPH.format(15)),
    QuantizedTolerance("layer_snr", "int4", 2.0, _LAYER.format(3.5)),
)


def quantized_tolerances(formats: Collection[str]) -> tuple[QuantizedTolerance, ...]:
    """The rows for a bundle: those of the coarsest format that any of its layers has.

    Raises:
        ValueError: if the table knows none of the formats.
    """
    for coarsest in ("int4", "int8", "int8-weight-only"):
        if coarsest in formats:
            return tuple(row for row in QUANTIZED_TOLERANCES if row.format == coarsest)
    msg = f"tolerance: found none for layers in {', '.join(sorted(formats)) or 'no format'}"
    raise ValueError(msg)
