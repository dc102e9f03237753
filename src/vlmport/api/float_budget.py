"""Finds the layers that have to stay in float, by quantizing others and measuring the answers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.api.layer_groups import layer_groups
from vlmport.api.progress import SilentProgress
from vlmport.api.quantize_graphs import open_graphs, quantize_layers
from vlmport.api.reference_answers import ask_reference
from vlmport.api.sensitivity import (
    FloatBudget,
    GroupDamage,
    fewest_in_float,
    lost_percent_without,
    rank_layers,
)
from vlmport.api.variants import variants_of
from vlmport.calibration.layers import find_layers
from vlmport.runtime import Request, VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from vlmport.api.layer_groups import LayerGroup
    from vlmport.api.progress import Progress
    from vlmport.api.quantize_graphs import GraphWork
    from vlmport.calibration.recipe import LayerFormat, Recipe
    from vlmport.calibration.samples import CalibrationSample
    from vlmport.calibration.statistics import Statistics

__all__ = ["BudgetReport", "keep_within_budget"]

# Questions that a ranking asks again for every group of layers.
_MOST_QUESTIONS = 16


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """How the layers that stay in float were chosen.

    Attributes:
        ranking: every group of layers, the most damaging first.
        budget: what was kept, and what is lost with it.
    """

    ranking: tuple[GroupDamage, ...]
    budget: FloatBudget


def keep_within_budget(
    bundle: Path,
    files: Mapping[str, str],
    recipe: Recipe,
    works: Mapping[str, GraphWork],
    statistics: Statistics,
    samples: Sequence[CalibrationSample],
    budget_percent: float,
    progress: Progress,
) -> tuple[dict[str, dict[str, LayerFormat]], BudgetReport]:
    """The formats that lose no more than the budget, with as few layers in float as possible.

    Args:
        bundle: the float bundle whose graphs are open in `works`.
        files: graph name -> path in the bundle.
        recipe: of the graphs.
        works: the open graphs with the formats that were asked for.
        statistics: of their values.
        samples: questions; the first 16 are asked.
        budget_percent: most next tokens, in percent, whose likeliest one may be another than that
            of the float bundle, on the float bundle's own answers.
        progress: is told of each group and question.

    Returns:
        Graph name -> layer name -> format, and how it was found.

    Raises:
        CalibrationError: if the budget cannot be met.
    """

    def make_variant(graph: str, names: Sequence[str]) -> ir.Model:
        wanted: dict[str, LayerFormat] = {
            name: form if name in names else "float" for name, form in works[graph].formats.items()
        }
        work = open_graphs(bundle, files, recipe, {graph: wanted}, only=graph)[graph]
        quantize_layers(work, statistics.get(graph, {}), SilentProgress())
        return work.model

    groups = _groups(works)
    model = VisionLanguageModel.load(bundle, verify=False)
    requests = [
        Request(prompt=sample.prompt, images=sample.images) for sample in samples[:_MOST_QUESTIONS]
    ]
    with tempfile.TemporaryDirectory(prefix=".vlmport.") as folder:
        answers = ask_reference(model, requests, Path(folder), progress)
        variants = variants_of(bundle, model, make_variant)
        ranking = rank_layers(groups, variants, answers, progress)
        measure = lost_percent_without(groups, variants, answers, progress)
        budget = fewest_in_float(ranking, budget_percent, measure)
    kept = {(group.graph, name) for group in budget.kept for name in group.layers}
    formats: dict[str, dict[str, LayerFormat]] = {
        graph: {
            name: "float" if (graph, name) in kept else form for name, form in work.formats.items()
        }
        for graph, work in works.items()
    }
    return formats, BudgetReport(ranking, budget)


def _groups(works: Mapping[str, GraphWork]) -> list[LayerGroup]:
    return [
        group
        for name, work in works.items()
        for group in layer_groups(
            name,
            [layer for layer in find_layers(work.model) if work.formats[layer.name] != "float"],
        )
    ]
