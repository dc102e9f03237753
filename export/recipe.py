"""How each weight of a graph is made of tensors of the checkpoint, without reading them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RECIPE_KEY", "PlannedWeight", "WeightRecipe", "planned"]

# Where a tensor of a written graph carries its recipe (TensorProto.metadata_props).
RECIPE_KEY = "vlmport.recipe"


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """concatenate(sources, axis 0) -> transpose? -> cast to the graph's element type.

    Attributes:
        sources: module parameter names, each a tensor of the checkpoint.
        transpose: whether the two axes of the concatenation are swapped.
    """

    sources: tuple[str, ...]
    transpose: bool = False

    def transposed(self) -> WeightRecipe:
        """The recipe of the transposed weight."""
        return replace(self, transpose=not self.transpose)

    def describe(self, dtype: str) -> str:
        """One line that is recorded beside the tensor in the graph."""
        steps = [" + ".join(self.sources)]
        if self.transpose:
            steps.append("transpose")
        return " | ".join([*steps, f"cast {dtype}"])


class PlannedWeight(ir.LazyTensor):
    """A weight with type, shape and recipe, and no values yet.

    Passes may replace it by another planned weight; `vlmport.export.stream` turns it into external
    data. Asking for its values is an error of ours.
    """

    def __init__(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], recipe: WeightRecipe
    ) -> None:
        super().__init__(
            _refuse,
            dtype=dtype,
            shape=ir.Shape(tuple(shape)),
            name=name,
            metadata_props={RECIPE_KEY: recipe.describe(dtype.name)},
        )
        self.recipe = recipe

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape as plain numbers."""
        return tuple(int(length) for length in self.shape.numpy())


def planned(value: ir.Value | None) -> PlannedWeight | None:
    """The planned weight behind a graph value, or None if it is anything else."""
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, PlannedWeight) else None


def _refuse() -> NoReturn:
    msg = "the values of a planned weight were asked for before they were streamed"
    raise AssertionError(msg)
