"""The recipes behind `--precision`: what a user gets who writes none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from vlmport.calibration.recipe import ActivationMethod, GraphRecipe, Recipe, WeightMethod
from vlmport.contract import IMAGE_GRAPHS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TargetPrecision", "default_recipe"]

TargetPrecision = Literal["fp16", "bf16", "int8", "int8-weight-only", "int4", "float"]
# Graphs with layers to quantize; an embedding is a lookup, and masks are drawn once an answer.
_QUANTIZED = (*IMAGE_GRAPHS, "decoder")
_CONVERTED = (*_QUANTIZED, "embed_tokens")


def default_recipe(
    precision: TargetPrecision,
    exceptions: Mapping[str, TargetPrecision],
    graphs: Sequence[str],
    weights: WeightMethod,
    activations: ActivationMethod,
) -> Recipe:
    """One precision for the whole bundle, and others for single graphs.

    Args:
        precision: of every graph that is not named in `exceptions`.
        exceptions: graph name -> its precision.
        graphs: names of the bundle's graphs.
        weights: how weights of weight-only layers are rounded.
        activations: how activations of "int8" layers get their scale.
    """
    parts = (_part(name, exceptions.get(name) or precision) for name in graphs)
    return Recipe(
        tuple(replace(part, weights=weights, activations=activations) for part in parts if part)
    )


def _part(graph: str, precision: TargetPrecision) -> GraphRecipe | None:
    if precision == "fp16" or precision == "bf16":
        return GraphRecipe(graph, compute=precision) if graph in _CONVERTED else None
    if precision == "float" or graph not in _QUANTIZED:
        return None
    if precision == "int8":
        # The head's activations decide between tokens that are nearly as likely; a convolution
        # reads pixels, and ONNX Runtime fuses none that gives out floats.
        return GraphRecipe(
            graph, layers="int8", output_head="int8-weight-only", convolutions="float"
        )
    return GraphRecipe(graph, layers=precision)
