"""Moves the scale of an activation's channels from the activation into weights, exactly.

    (x / s) @ (diag(s) @ W) = x @ W

The division by s goes into what computes x (a norm's weight, the output channels of an earlier
product), the multiplication into the weights of all layers that read x: no node is added.

Source: Xiao et al. 2022, "SmoothQuant", section 4; Lin et al. 2023, "AWQ", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.calibration.scale_paths import NoPathError, ScaledConstant, find_scale_path
from vlmport.calibration.scale_rules import known_lengths
from vlmport.errors import CalibrationError
from vlmport.export.recipe import RECIPE_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.calibration.layers import Layer

__all__ = ["Migration", "find_migrations", "migrate_", "refused_migrations"]


@dataclass(frozen=True, slots=True, eq=False)
class Migration:
    """An activation whose channels can be divided by a scale, and where the scale goes.

    Attributes:
        layers: all layers whose activation is scaled; channel i of each takes scale[i].
        groups: int64 [channels], the lowest channel that each must share its scale with. Query
            heads that read one head of values share it.
        constants: the weights and biases that are divided.
        caches: names of graph inputs that hold scaled values from then on; a cache of an unscaled
            graph must not be handed on.
    """

    layers: tuple[Layer, ...]
    groups: NDArray[np.int64]
    constants: tuple[ScaledConstant, ...]
    caches: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of the activation."""
        return len(self.groups)


def find_migrations(model: ir.Model, layers: Sequence[Layer]) -> tuple[Migration, ...]:
    """The activations of layers that can be scaled exactly, in the order of the layers.

    Args:
        model: a float graph; not changed.
        layers: those of `find_layers`, all of them: one that is left out is a strange reader of
            its activation and rules the migration out.
    """
    return _find(model, layers)[0]


def refused_migrations(model: ir.Model, layers: Sequence[Layer]) -> Mapping[str, str]:
    """Name of each layer that no migration covers -> what is in the way."""
    return _find(model, layers)[1]


def migrate_(model: ir.Model, migration: Migration, scale: NDArray[np.float32]) -> None:
    """Divides an activation's channels by a scale, without changing what the graph computes.

    Weights that change are computed from the old ones when they are asked for; migrations may
    follow each other.

    Args:
        model: the graph of the migration; changed in place.
        migration: from `find_migrations` of this graph.
        scale: float32 [channels], finite, > 0, equal within `migration.groups`.

    Raises:
        CalibrationError: if the scale is none of that.
    """
    _check_scale(migration, scale)
    for constant in migration.constants:
        value = _initializer(model, constant)
        old = value.const_value
        assert old is not None
        reached = constant.labels >= 0
        divisor = np.where(reached, scale.astype(np.float64)[constant.labels], 1.0)
        _multiply(value, divisor**-constant.power)
    for layer in migration.layers:
        lengths = [1] * len(known_lengths(layer.weight) or ())
        lengths[layer.input_axis] = migration.channels
        _multiply(layer.weight, scale.reshape(lengths))


def _find(model: ir.Model, layers: Sequence[Layer]) -> tuple[tuple[Migration, ...], dict[str, str]]:
    del model  # The layers' nodes know their graph.
    by_node = {layer.node: layer for layer in layers}
    found: list[Migration] = []
    refused: dict[str, str] = {}
    covered: set[str] = set()
    for layer in layers:
        if layer.name in covered:
            continue
        try:
            migration = _migration(layer, by_node)
        except NoPathError as error:
            refused[layer.name] = str(error)
            continue
        found.append(migration)
        covered.update(reader.name for reader in migration.layers)
    return tuple(found), {name: why for name, why in refused.items() if name not in covered}


def _migration(layer: Layer, by_node: Mapping[ir.Node, Layer]) -> Migration:
    if layer.operator == "Conv":
        raise NoPathError("a Conv reads pictures, which nothing scales")
    # A Gemm's activation has two axes whether or not its shape is known.
    lengths = known_lengths(layer.activation) or ((None, None) if layer.operator == "Gemm" else ())
    if not lengths:
        raise NoPathError(f"{layer.activation.name!r} has an unknown shape")
    path = find_scale_path(
        layer.activation,
        len(lengths),
        layer.in_channels,
        lambda node, index: index == 0 and node in by_node,
    )
    readers = [
        by_node[use.node]
        for value in path.scaled
        for use in value.uses()
        if use.node in by_node and use.idx == 0 and (use.node, 0) not in path.uses
    ]
    for reader in readers:
        labels, power = path.scaled[reader.activation]
        whole = labels.size == labels.shape[-1] == layer.in_channels
        if not whole or power != 1 or (path.groups[labels.reshape(-1)] != path.groups).any():
            raise NoPathError(f"{reader.name} reads the channels in another order or scale")
    places = {reader.node: place for place, reader in enumerate(by_node.values())}
    readers.sort(key=lambda reader: places[reader.node])
    caches = tuple(str(value.name) for value in path.scaled if value.is_graph_input())
    return Migration(tuple(readers), path.groups, tuple(path.constants), caches)


def _check_scale(migration: Migration, scale: NDArray[np.float32]) -> None:
    name = migration.layers[0].name
    if scale.shape != (migration.channels,):
        msg = f"{name}: a scale of shape {scale.shape}; expected ({migration.channels},)"
        raise CalibrationError(msg)
    if not np.isfinite(scale).all() or (scale <= 0).any():
        msg = f"{name}: a scale with {scale.min()} to {scale.max()}; expected finite numbers > 0"
        raise CalibrationError(msg)
    if (scale != scale[migration.groups]).any():
        msg = f"{name}: channels that must share a scale have different ones; use groups"
        raise CalibrationError(msg)


def _initializer(model: ir.Model, constant: ScaledConstant) -> ir.Value:
    """The weight at an input of a node; a sum of two is computed first."""
    value = constant.node.inputs[constant.index]
    assert value is not None
    total = value.producer()
    if total is None:
        return value
    addends = [operand.const_value for operand in total.inputs if operand is not None]
    first, second = (tensor for tensor in addends if tensor is not None)
    # One addend is a parameter, the other a constant of the module's code.
    recipe = "".join(tensor.metadata_props.get(RECIPE_KEY, "") for tensor in (first, second))
    weight = ir.Value(
        name=value.name,
        shape=value.shape,
        type=value.type,
        const_value=ir.LazyTensor(
            lambda: ir.tensor(first.numpy() + second.numpy()),
            dtype=first.dtype,
            shape=ir.Shape(known_lengths(value) or ()),
            name=value.name,
            metadata_props={RECIPE_KEY: f"{recipe} | add"} if recipe else {},
        ),
    )
    sources = [operand for operand in total.inputs if operand is not None]
    constant.node.replace_input_with(constant.index, weight)
    model.graph.remove(total, safe=True)
    for source in sources:
        if not source.uses():
            model.graph.initializers.pop(str(source.name), None)
    model.graph.initializers.add(weight)
    return weight


def _multiply(weight: ir.Value, factor: NDArray[np.floating]) -> None:
    """Puts a tensor that computes weight * factor, when asked, in the weight's place."""
    old = weight.const_value
    assert old is not None
    kept = factor.astype(np.float32)

    def compute() -> ir.TensorProtocol:
        values = old.numpy()
        return ir.tensor((values.astype(np.float32) * kept).astype(values.dtype), name=weight.name)

    weight.const_value = ir.LazyTensor(
        compute,
        dtype=old.dtype,
        shape=ir.Shape(old.shape.numpy()),
        name=weight.name,
        metadata_props=dict(old.metadata_props),
    )
