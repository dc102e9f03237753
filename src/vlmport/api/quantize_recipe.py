"""From the options of `vlmport quantize` to a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmport.calibration.default_recipes import default_recipe
from vlmport.calibration.recipe import (
    ActivationMethod,
    LayerRule,
    Recipe,
    WeightMethod,
    load_recipe,
    rule_fits,
)
from vlmport.errors import CalibrationError, close_matches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.calibration.default_recipes import TargetPrecision
    from vlmport.calibration.layers import Layer

__all__ = ["RecipeOptions", "kept_in_float", "read_patterns", "wanted_recipe"]

_WEIGHTS, _ACTIVATIONS = WeightMethod(), ActivationMethod()


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """What the user asked for; a recipe file takes the place of all the rest.

    Attributes:
        precision: of every graph that is not named in `exceptions`; None leaves them as they are.
        exceptions: (graph, its precision) pairs.
        weights: how weights of weight-only layers are rounded.
        activations: how activations of "int8" layers get their scale.
        kv_cache: element type of a float32 decoder's cache.
        file: a recipe in JSON.
    """

    precision: TargetPrecision | None = None
    exceptions: tuple[tuple[str, TargetPrecision], ...] = ()
    weights: WeightMethod = _WEIGHTS
    activations: ActivationMethod = _ACTIVATIONS
    kv_cache: Literal["keep", "fp16"] = "keep"
    file: Path | None = None

    @property
    def name(self) -> str:
        """What was asked for, in a word or two."""
        if self.file is not None:
            return self.file.name
        parts = [self.precision or "", *(f"{graph} {name}" for graph, name in self.exceptions)]
        parts += [f"cache {self.kv_cache}"] if self.kv_cache != "keep" else []
        return ", ".join(part for part in parts if part)


def wanted_recipe(options: RecipeOptions, graphs: Sequence[str]) -> Recipe:
    """The recipe for a bundle with these graphs.

    Raises:
        CalibrationError: if nothing is asked for, a file and a precision are, or a graph is named
            that the bundle has not.
    """
    asked = options.precision is not None or bool(options.exceptions) or options.kv_cache != "keep"
    if options.file is not None and asked:
        msg = (
            f"recipe: found {options.file} and precisions beside it; expected one of the two; "
            "write the precisions into the recipe"
        )
        raise CalibrationError(msg)
    if options.file is None and not asked:
        msg = (
            "precision: found none; give --precision, a precision of a graph, --kv-cache, or "
            "--recipe"
        )
        raise CalibrationError(msg)
    if options.file is not None:
        recipe = load_recipe(options.file)
    else:
        recipe = default_recipe(
            options.precision or "float",
            dict(options.exceptions),
            graphs,
            options.weights,
            options.activations,
        )
    if options.kv_cache != "keep":
        recipe = replace(recipe, kv_cache=options.kv_cache)
    named = [*(part.graph for part in recipe.graphs), *(name for name, _ in options.exceptions)]
    for name in named:
        if name not in graphs:
            msg = f"recipe: the bundle has no graph {name!r}; {close_matches(name, graphs)}"
            raise CalibrationError(msg)
    return recipe


def read_patterns(path: Path) -> tuple[str, ...]:
    """Patterns of module names, one a line; empty lines and lines that begin with "#" are skipped.

    Raises:
        CalibrationError: if the file cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read ({error}); expected a text with a module's name a line"
        raise CalibrationError(msg) from error
    patterns = tuple(line.strip() for line in lines if line.strip() and line.strip()[0] != "#")
    if not patterns:
        msg = f"{path}: names no module; expected a pattern such as '*.layers.0.*' a line"
        raise CalibrationError(msg)
    return patterns


def kept_in_float(
    recipe: Recipe,
    patterns: Sequence[str],
    layers: Mapping[str, Sequence[Layer]],
) -> Recipe:
    """The recipe with the modules of these patterns left in float.

    Args:
        recipe: what is done without them.
        patterns: of module names.
        layers: graph name -> its layers.

    Raises:
        CalibrationError: if a pattern fits no layer of any graph.
    """
    rules: dict[str, list[LayerRule]] = {name: [] for name in layers}
    for pattern in patterns:
        rule = LayerRule(pattern, "float")
        fitting = [name for name in layers if any(rule_fits(rule, x) for x in layers[name])]
        if not fitting:
            known = [module for found in layers.values() for x in found for module in x.modules]
            msg = f"keep-float: {pattern!r} names no layer; {close_matches(pattern, known)}"
            raise CalibrationError(msg)
        for name in fitting:
            rules[name].append(rule)
    return replace(
        recipe,
        graphs=tuple(
            replace(part, rules=(*rules.get(part.graph, ()), *part.rules)) for part in recipe.graphs
        ),
    )
