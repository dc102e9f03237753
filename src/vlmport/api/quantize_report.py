"""What became of each layer of a bundle, and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlmport.api.float_budget import BudgetReport
from vlmport.calibration.activation_int8 import ActivationRange
from vlmport.calibration.half_precision import HalfReport
from vlmport.calibration.recipe import Compute, LayerFormat
from vlmport.calibration.weight_only import QuantizedLayer
from vlmport.contract import Manifest

__all__ = ["GraphReport", "QuantizeReport", "report_json"]


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One graph.

    Attributes:
        graph: its name.
        compute: element type of what is not quantized; "keep" for that of the bundle.
        formats: layer name -> format, as it is now.
        weights: layers with quantized weights and float activations.
        activations: layers with quantized weights and activations.
        half: what stayed float32 in a graph of half precision; None in others.
    """

    graph: str
    compute: Compute
    formats: dict[str, LayerFormat]
    weights: tuple[QuantizedLayer, ...]
    activations: tuple[ActivationRange, ...]
    half: HalfReport | None

    @property
    def counts(self) -> dict[str, int]:
        """Format -> number of layers."""
        return dict(sorted(Counter(self.formats.values()).items()))


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was written.

    Attributes:
        bundle: the folder.
        source: the manifest of the bundle that it was made from.
        manifest: its own manifest.
        graphs: the graphs that were changed.
        budget: how layers were chosen that stay in float; None without an accuracy budget.
        seconds: how long it took.
    """

    bundle: Path
    source: Manifest
    manifest: Manifest
    graphs: tuple[GraphReport, ...]
    budget: BudgetReport | None
    seconds: float


def report_json(graphs: Sequence[GraphReport], budget: BudgetReport | None) -> str:
    """The reports of all graphs, and of the budget, as one JSON object."""
    content = {
        "graphs": [asdict(graph) for graph in graphs],
        "budget": None if budget is None else asdict(budget),
    }
    return json.dumps(content, indent=2) + "\n"
