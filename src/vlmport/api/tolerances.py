"""How far a bundle may be from PyTorch: the one table that every parity verdict comes from."""

from __future__ import annotations

from dataclasses import dataclass

from vlmport.errors import close_matches

__all__ = ["TOLERANCES", "Tolerance", "near_tie_margin", "tolerance_for"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The greatest difference of one quantity at one precision.

    Attributes:
        quantity: "preprocessing", the name of a graph, or "logits" (the decoder's output).
        precision: element type of the bundle's computation.
        max_abs: limit of the largest |bundle - PyTorch|.
        mean_abs: limit of the mean |bundle - PyTorch|, or None for no limit of its own.
        is_relative: whether the limits are fractions of PyTorch's own largest and mean magnitude.
        reason: why these numbers.
    """

    quantity: str
    precision: str
    max_abs: float
    mean_abs: float | None
    is_relative: bool
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

TOLERANCES = (
    Tolerance(
        quantity="preprocessing",
        precision="float32",
        max_abs=0.0,
        mean_abs=None,
        is_relative=False,
        reason="both sides resample with Pillow and then do the same float32 operations in the "
        "same order, so a single differing bit is a different operation",
    ),
    Tolerance("vision_encoder", "float32", 8e-6, 3e-6, is_relative=True, reason=_HIDDEN_STATES),
    Tolerance(
        quantity="projector",
        precision="float32",
        max_abs=8e-6,
        mean_abs=3e-6,
        is_relative=True,
        reason="the scale of image features is the checkpoint's own, as for vision_encoder; "
        "measured at up to 1.2e-6 of the largest and 6.4e-7 of the mean magnitude",
    ),
    Tolerance(
        quantity="embed_tokens",
        precision="float32",
        max_abs=0.0,
        mean_abs=None,
        is_relative=False,
        reason="a lookup copies rows of the weight, and a scale is one rounded product on both "
        "sides: there is nothing to sum, hence nothing that may differ",
    ),
    Tolerance(
        quantity="logits",
        precision="float32",
        max_abs=1e-4,
        mean_abs=None,
        is_relative=False,
        reason="differences of logits are what softmax and argmax see, so the limit is absolute: "
        "1e-4 changes a probability by at most 0.02 % of itself. Small decoders were measured at "
        "7e-7 to 4.5e-6",
    ),
)


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


def near_tie_margin(precision: str) -> float:
    """The largest gap of two reference logits that errors within tolerance can turn round.

    The upper logit may be too low by the tolerance and the lower one too high by as much, so twice
    the tolerance; a wider gap can only be bridged by a logit that is out of tolerance.
    """
    return 2 * tolerance_for("logits", precision).max_abs
