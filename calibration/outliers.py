"""Finds layers whose activations no INT8 range can represent.

Some models write values thousands of times larger than the rest at the first token of a prompt;
attention then rests there. Any range that holds them leaves nothing of the other values, and any
that clips them breaks the attention of all later tokens.

Source: Sun et al. 2024, "Massive Activations in Large Language Models", section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.calibration.observers import percentile_threshold
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.calibration.layers import Layer
    from vlmport.calibration.statistics import GraphStatistics

__all__ = ["OUTLIER_RATIO", "outlier_layers", "outlier_ratio"]

# SmolLM2-135M, W8A8 smoothed with alpha 0.8: perplexity rises by 1.8 % without the 3 layers beyond
# 100 and by 1.9 % without the 6 beyond 20, both +- 0.4 %, so the others need no exception.
OUTLIER_RATIO = 100.0
_USUAL_PERCENT = 99.9


def outlier_ratio(layer: Layer, statistics: GraphStatistics) -> float:
    """The largest magnitude of a layer's activation over its 99.9th percentile.

    Args:
        layer: a layer.
        statistics: of the unsmoothed graph, with the histogram of the layer's activation.

    Returns:
        At least 1; 1 if the activation is always 0, infinity if 99.9 % of it is.

    Raises:
        CalibrationError: if there is no histogram.
    """
    seen = statistics.get(str(layer.activation.name))
    if seen is None or seen.histogram is None:
        msg = (
            f"{layer.name}: no histogram of its activation {layer.activation.name!r}; outliers are "
            "found in it; collect the statistics again with one"
        )
        raise CalibrationError(msg)
    if seen.amax == 0:
        return 1.0
    usual = percentile_threshold(seen.histogram, _USUAL_PERCENT)
    return max(1.0, seen.amax / usual) if usual > 0 else float("inf")


def outlier_layers(
    layers: Sequence[Layer], statistics: GraphStatistics, ratio: float = OUTLIER_RATIO
) -> tuple[str, ...]:
    """Names of the layers whose activation should not become INT8; weight-only INT8 is for them.

    Args:
        layers: those that are to become INT8.
        statistics: of the unsmoothed graph, with histograms of their activations.
        ratio: how many times its 99.9th percentile an activation may reach.

    Raises:
        CalibrationError: if there is no histogram of a layer's activation.
    """
    return tuple(layer.name for layer in layers if outlier_ratio(layer, statistics) > ratio)
