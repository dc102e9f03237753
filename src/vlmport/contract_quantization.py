"""What a manifest says of a bundle whose graphs were quantized."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict

__all__ = ["Quantization", "QuantizedGraph"]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class QuantizedGraph:
    """How one graph computes.

    Attributes:
        graph: its name.
        compute: element type of what is not quantized ("float32", "float16", "bfloat16").
        layers: format -> number of layers that have it; "float" for those in the element type
            of `compute`, or in float32 where that would not hold their values.
    """

    __pydantic_config__ = _STRICT
    graph: str
    compute: str
    layers: dict[str, int]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a bundle was made from one of higher precision.

    Attributes:
        name: what was asked for, for people ("int8", "int4", "recipe.json").
        graphs: the graphs that were changed.
        recipe: path of the recipe in the bundle.
        report: path of the report in the bundle: what became of each layer, and why.
        calibration: where the calibration data came from, for people; "" if none was needed.
        samples: questions that were run for calibration.
    """

    __pydantic_config__ = _STRICT
    name: str
    graphs: tuple[QuantizedGraph, ...]
    recipe: str
    report: str
    calibration: str
    samples: int

    @property
    def has_integer_layers(self) -> bool:
        """Whether any layer's weights are integers."""
        return any(set(graph.layers) - {"float"} for graph in self.graphs)
