"""What is to be done with each layer of each graph: a frozen value, read from and written as JSON.

A recipe names graphs, and within a graph layers by the names of their PyTorch modules. It holds no
numbers that follow from data: scales come from statistics, by the methods that it names.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlmport.errors import CalibrationError, close_matches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlmport.calibration.layers import Layer

__all__ = [
    "ActivationMethod",
    "Compute",
    "GraphRecipe",
    "LayerFormat",
    "LayerRule",
    "Recipe",
    "WeightMethod",
    "layer_formats",
    "load_recipe",
    "recipe_json",
    "rule_fits",
]

RECIPE_SCHEMA_VERSION = 1
# "float" leaves a layer in the graph's own element type.
LayerFormat = Literal["float", "int8", "int8-weight-only", "int4"]
# The element type of all that is not quantized; "keep" for that of the bundle.
Compute = Literal["keep", "fp16", "bf16"]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class LayerRule:
    """Layers that are treated otherwise than the rest of their graph.

    Attributes:
        modules: a pattern of a PyTorch module's whole name, "*" for any characters
            ("*.layers.0.*", "*.down_proj"); it fits a layer if it fits one of its modules.
        format: what they become.
    """

    __pydantic_config__ = _STRICT
    modules: str
    format: LayerFormat


@dataclass(frozen=True, slots=True)
class WeightMethod:
    """How weights of formats "int8-weight-only" and "int4" are rounded.

    Attributes:
        rounding: "nearest", "awq" (channels are scaled first, Lin et al. 2023), "gptq" (rounding
            errors are compensated by later rows, Frantar et al. 2022) or "awq+gptq".
        block_size: weights along the input axis that share a scale.
        int8_rounding: the same as rounding for "int8-weight-only", where rounding to nearest is
            nearly exact.
    """

    __pydantic_config__ = _STRICT
    rounding: Literal["nearest", "awq", "gptq", "awq+gptq"] = "gptq"
    block_size: Literal[32, 64, 128] = 32
    int8_rounding: Literal["nearest", "gptq"] = "nearest"


@dataclass(frozen=True, slots=True)
class ActivationMethod:
    """How the inputs of "int8" layers get their scale.

    Attributes:
        observer: "min_max", "percentile", "entropy" or "mse".
        percentile: share of the values, in percent, that "percentile" keeps inside the range.
        smoothing: how far channels' ranges are moved from activations into weights before: 0 not
            at all, 1 wholly; SmoothQuant's alpha (Xiao et al. 2022, equation 4). None for none.
        outlier_ratio: how many times its 99.9th percentile an activation may reach; the layer of
            one that reaches further becomes "int8-weight-only" (`vlmport.calibration.outliers`).
            None for any number.
    """

    __pydantic_config__ = _STRICT
    observer: Literal["min_max", "percentile", "entropy", "mse"] = "min_max"
    percentile: float = 99.99
    smoothing: float | None = 0.8
    outlier_ratio: float | None = 100.0


@dataclass(frozen=True, slots=True)
class GraphRecipe:
    """What becomes of one graph.

    Attributes:
        graph: its name in the manifest.
        layers: the format of its layers.
        compute: element type of everything else.
        output_head: the format of the layer that makes the logits; None for that of the others.
        convolutions: the format of convolutions; None for that of the others.
        rules: exceptions; the first that fits a layer holds.
        weights: see `WeightMethod`.
        activations: see `ActivationMethod`.
    """

    __pydantic_config__ = _STRICT
    graph: str
    layers: LayerFormat = "float"
    compute: Compute = "keep"
    output_head: LayerFormat | None = None
    convolutions: LayerFormat | None = None
    rules: tuple[LayerRule, ...] = ()
    weights: WeightMethod = WeightMethod()
    activations: ActivationMethod = ActivationMethod()


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of a bundle; graphs that are not named stay as they are.

    Attributes:
        graphs: the graphs that change.
        kv_cache: element type of a float32 decoder's keys and values; "keep" for its own.
    """

    __pydantic_config__ = _STRICT
    graphs: tuple[GraphRecipe, ...]
    kv_cache: Literal["keep", "fp16"] = "keep"
    schema_version: int = RECIPE_SCHEMA_VERSION

    def graph(self, name: str) -> GraphRecipe:
        """The part for a graph; one that changes nothing if the recipe does not name it."""
        return next((part for part in self.graphs if part.graph == name), GraphRecipe(name))


_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe from a JSON file.

    Raises:
        CalibrationError: if it cannot be read, is not JSON or has a fault; all listed at once.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        recipe = _RECIPE.validate_python(content)
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); expected a recipe in JSON"
        raise CalibrationError(msg) from error
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, detail['loc'])) or 'recipe'}: {detail['msg']}"
            for detail in error.errors(include_url=False)
        ]
        msg = f"{path}: not a recipe:\n  " + "\n  ".join(faults)
        raise CalibrationError(msg) from error
    except ValueError as error:
        msg = f"{path}: not valid JSON ({error}); expected a recipe"
        raise CalibrationError(msg) from error
    if recipe.schema_version != RECIPE_SCHEMA_VERSION:
        msg = (
            f"{path}: schema_version {recipe.schema_version}; this vlmport reads "
            f"{RECIPE_SCHEMA_VERSION}; write the recipe again"
        )
        raise CalibrationError(msg)
    return recipe


def recipe_json(recipe: Recipe) -> str:
    """The recipe as `load_recipe` reads it."""
    return _RECIPE.dump_json(recipe, indent=2).decode() + "\n"


def layer_formats(recipe: GraphRecipe, layers: Sequence[Layer]) -> Mapping[str, LayerFormat]:
    """Layer name -> format, in the order of the layers.

    Raises:
        CalibrationError: if a rule fits no layer of the graph.
    """
    for rule in recipe.rules:
        if not any(rule_fits(rule, layer) for layer in layers):
            known = [module for layer in layers for module in layer.modules]
            msg = (
                f"recipe: the rule {rule.modules!r} of {recipe.graph} names no layer; "
                f"{close_matches(rule.modules, known)}"
            )
            raise CalibrationError(msg)
    return {layer.name: _format(recipe, layer) for layer in layers}


def _format(recipe: GraphRecipe, layer: Layer) -> LayerFormat:
    for rule in recipe.rules:
        if rule_fits(rule, layer):
            return rule.format
    if recipe.output_head is not None and layer.makes_logits:
        return recipe.output_head
    if recipe.convolutions is not None and layer.operator == "Conv":
        return recipe.convolutions
    return recipe.layers


def rule_fits(rule: LayerRule, layer: Layer) -> bool:
    """Whether a rule is about a layer."""
    return any(fnmatch.fnmatchcase(module, rule.modules) for module in layer.modules)
