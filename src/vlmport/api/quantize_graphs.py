"""The graphs of a bundle on their way to lower precision, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.calibration.half_precision import half_probes
from vlmport.calibration.layers import Layer, find_layers
from vlmport.calibration.recipe import layer_formats
from vlmport.calibration.statistics import Probe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from vlmport.calibration.recipe import GraphRecipe, LayerFormat, Recipe

__all__ = ["GraphWork", "first_probes", "open_graphs", "second_probes", "smoothed", "transform"]


@dataclass(frozen=True, slots=True, eq=False)
class GraphWork:
    """One graph that a recipe changes.

    Attributes:
        recipe: what becomes of it.
        model: the graph; changed in place by `smoothed` and `transform`.
        formats: layer name -> format.
    """

    recipe: GraphRecipe
    model: ir.Model
    formats: Mapping[str, LayerFormat]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that the graph has now."""
        return find_layers(self.model)

    def has(self, *formats: LayerFormat) -> bool:
        """Whether a layer has one of these formats."""
        return bool(set(formats) & set(self.formats.values()))


def open_graphs(
    bundle: Path,
    recipe: Recipe,
    formats: Mapping[str, Mapping[str, LayerFormat]] | None = None,
) -> dict[str, GraphWork]:
    """Opens the graphs that the recipe changes; weights stay in their files.

    Args:
        bundle: folder of the bundle.
        recipe: names its graphs.
        formats: graph name -> formats of its layers, where they are settled already.

    Raises:
        CalibrationError: if a rule of the recipe names no layer.
    """
    works = {}
    for part in recipe.graphs:
        model = ir.load(bundle / f"{part.graph}.onnx")
        found = (formats or {}).get(part.graph) or layer_formats(part, find_layers(model))
        works[part.graph] = GraphWork(part, model, found)
    return works


def first_probes(works: Mapping[str, GraphWork]) -> dict[str, tuple[Probe, ...]]:
    """What has to be known before anything is changed, by graph; graphs that need nothing are out.

    Ranges of channels for smoothing, or histograms where nothing is smoothed; second moments for
    AWQ and GPTQ; ranges of all values for half precision.
    """
    wanted = {name: _first_probes(work) for name, work in works.items()}
    return {name: probes for name, probes in wanted.items() if probes}


def second_probes(works: Mapping[str, GraphWork]) -> dict[str, tuple[Probe, ...]]:
    """What has to be known of smoothed graphs: how the inputs of "int8" layers are distributed."""
    wanted = {
        name: _merged(_probe(layer, histogram=True) for layer in _in_format(work, "int8"))
        for name, work in works.items()
        if _is_smoothed(work)
    }
    return {name: probes for name, probes in wanted.items() if probes}


def _first_probes(work: GraphWork) -> tuple[Probe, ...]:
    probes = [_probe(layer, histogram=True) for layer in _in_format(work, "int8")]
    method = work.recipe.weights
    for layer_format, rounding in (
        ("int4", method.rounding),
        ("int8-weight-only", method.int8_rounding),
    ):
        if rounding != "nearest":
            probes += [_probe(layer, moment=True) for layer in _in_format(work, layer_format)]
    if work.recipe.compute != "keep":
        probes += half_probes(work.model)
    return _merged(probes)


def _probe(layer: Layer, *, histogram: bool = False, moment: bool = False) -> Probe:
    assert layer.activation.name is not None
    axis = 1 if layer.operator == "Conv" else -1
    return Probe(layer.activation.name, axis, histogram=histogram, second_moment=moment)


def _in_format(work: GraphWork, wanted: LayerFormat) -> list[Layer]:
    return [layer for layer in work.layers if work.formats[layer.name] == wanted]


def _is_smoothed(work: GraphWork) -> bool:
    return work.recipe.activations.smoothing is not None and "int8" in work.formats.values()


def _merged(probes: Iterable[Probe]) -> tuple[Probe, ...]:
    """One probe a value, which collects what any of them does."""
    merged: dict[str, Probe] = {}
    for probe in probes:
        known = merged.get(probe.value, probe)
        merged[probe.value] = replace(
            known,
            channels=known.channels or probe.channels,
            histogram=known.histogram or probe.histogram,
            second_moment=known.second_moment or probe.second_moment,
        )
    return tuple(merged.values())
