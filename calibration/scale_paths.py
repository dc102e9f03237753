"""Follows the channels of a value back to the constants that a scale of them can move into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmport.calibration.scale_rules import RULES, UNSCALED, Move, NoPathError, known_lengths

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir
    from numpy.typing import NDArray

    from vlmport.calibration.scale_rules import Labels

__all__ = ["NoPathError", "ScalePath", "ScaledConstant", "find_scale_path"]

# Mul leaves a choice of operands; graphs of models have one or two of them on a path.
_MAX_ATTEMPTS = 64


@dataclass(frozen=True, slots=True, eq=False)
class ScaledConstant:
    """A constant input of a node that takes up a scale.

    The input is named by its node, since the value there may be replaced.

    Attributes:
        node: the node that reads it.
        index: its place among the node's inputs.
        labels: int64 of the constant's rank, lengths its own or 1: number of the channel whose
            scale an element takes, or -1 for none.
        power: the element is divided by scale ** power.
    """

    node: ir.Node
    index: int
    labels: Labels
    power: float


@dataclass(slots=True, eq=False)
class ScalePath:
    """What a scale of a value's channels moves into.

    Attributes:
        groups: int64 [channels], the lowest channel that each must share its scale with.
        choices: which operand is followed at each Mul of two computed values.
        choices_met: how many of them the walk has come by.
        scaled: every value that is scaled -> labels of its elements and power of the scale.
        constants: what takes up the scale.
        uses: (node, index of the input) through which scaled values reach others of them.
    """

    groups: NDArray[np.int64]
    choices: tuple[int, ...] = ()
    choices_met: int = 0
    scaled: dict[ir.Value, tuple[Labels, float]] = field(default_factory=dict)
    constants: list[ScaledConstant] = field(default_factory=list)
    uses: set[tuple[ir.Node, int]] = field(default_factory=set)

    def scale(self, value: ir.Value, labels: Labels, power: float) -> None:
        """Scales a value and, through what computes it, others until constants take it up.

        Raises:
            NoPathError: if a node is in the way.
        """
        if value in self.scaled:
            known, known_power = self.scaled[value]
            if known_power != power or known.shape != labels.shape:
                raise NoPathError(f"{value.name!r} would need two scales")
            self._share(known, labels)
            return
        self.scaled[value] = (labels, power)
        node = value.producer()
        if node is None:
            if not _is_cache(value):
                raise NoPathError(f"{value.name!r} enters the graph from outside")
            return
        for move in self._moves(node, value, labels):
            if move.shared is not None:
                self._share(*move.shared)
            self._follow(node, move, power * move.power)

    def _moves(self, node: ir.Node, output: ir.Value, labels: Labels) -> list[Move]:
        if node.op_type == "Mul" and not node.domain:
            return [Move(self._factor(node), labels)]
        if node.domain or node.op_type not in RULES:
            raise NoPathError(
                f"{output.name!r} is computed by {node.op_type}, which a scale cannot pass"
            )
        return RULES[node.op_type](node, node.outputs.index(output), labels)

    def _factor(self, node: ir.Node) -> int:
        """Which operand of a product to scale: a constant of many elements, else as chosen."""
        for index, value in enumerate(node.inputs):
            if value is not None and _is_constant(value):
                one = all(length == 1 for length in known_lengths(value) or ())
                return 1 - index if one else index
        self.choices_met += 1
        if self.choices_met > len(self.choices):
            self.choices = (*self.choices, 0)
        return self.choices[self.choices_met - 1]

    def _follow(self, node: ir.Node, move: Move, power: float) -> None:
        value = node.inputs[move.index]
        assert value is not None
        if not _is_constant(value):
            self.uses.add((node, move.index))
            self.scale(value, move.labels, power)
            return
        lengths = known_lengths(value) or ()
        labels = move.labels
        if len(value.uses()) != 1:
            raise NoPathError(f"the constant {value.name!r} has other readers")
        # Aligned as in broadcasting.
        labels = labels.reshape((1,) * (len(lengths) - labels.ndim) + labels.shape)
        extra = labels.ndim - len(lengths)
        held = labels.shape[extra:]
        if labels.shape[:extra] != (1,) * extra or any(
            length not in {1, has} for length, has in zip(held, lengths, strict=True)
        ):
            raise NoPathError(f"the constant {value.name!r} does not hold each channel")
        self.constants.append(ScaledConstant(node, move.index, labels.reshape(held), power))

    def _share(self, first: Labels, second: Labels) -> None:
        """Asks for the same scale of channels that meet in an element."""
        if not np.array_equal(first == UNSCALED, second == UNSCALED):
            raise NoPathError("some elements would need both a scale and none")
        pairs = np.stack([first.reshape(-1), second.reshape(-1)], axis=1)
        for one, other in np.unique(pairs, axis=0):
            low, high = sorted((self.groups[one], self.groups[other]))
            if one != UNSCALED and low != high:
                self.groups[self.groups == high] = low


def find_scale_path(
    value: ir.Value, rank: int, channels: int, is_reader: Callable[[ir.Node, int], bool]
) -> ScalePath:
    """The constants that change when the channels of a value are divided by a scale.

    Args:
        value: float [.., channels].
        rank: its number of axes.
        channels: length of its last axis.
        is_reader: says of a node and the index of an input whether the scale is undone there.

    Returns:
        A path: with its constants scaled, everything but its values and the readers' inputs is
        computed as before.

    Raises:
        NoPathError: if there is none.
    """
    labels = np.arange(channels).reshape((1,) * (rank - 1) + (channels,))
    plans: list[tuple[int, ...]] = [()]
    reasons: list[str] = []
    while plans and len(reasons) < _MAX_ATTEMPTS:
        plan = plans.pop()
        path = ScalePath(np.arange(channels), plan)
        try:
            path.scale(value, labels, 1.0)
            _check_uses(path, is_reader)
        except NoPathError as error:
            reasons.append(str(error))
            plans += [(*path.choices[:at], 1) for at in range(len(plan), len(path.choices))]
        else:
            return path
    raise NoPathError("; ".join(dict.fromkeys(reasons)))


def _check_uses(path: ScalePath, is_reader: Callable[[ir.Node, int], bool]) -> None:
    for value in path.scaled:
        if value.is_graph_output() and not _is_cache(value):
            raise NoPathError(f"{value.name!r} leaves the graph")
        for node, index in value.uses():
            if (node, index) not in path.uses and not is_reader(node, index):
                raise NoPathError(f"{value.name!r} is read by {node.op_type} as well")


def _is_constant(value: ir.Value) -> bool:
    if value.is_initializer():
        return True
    # Norms of some models store their weight less 1.
    node = value.producer()
    return (
        node is not None
        and node.op_type == "Add"
        and all(operand is not None and operand.is_initializer() for operand in node.inputs)
    )


def _is_cache(value: ir.Value) -> bool:
    """Whether a value belongs to a store that the caller hands from call to call unread."""
    if value.is_graph_input():
        uses = list(value.uses())
        return len(uses) == 1 and uses[0].node.op_type == "TensorScatter" and uses[0].idx == 0
    node = value.producer()
    past = node.inputs[0] if node is not None and node.op_type == "TensorScatter" else None
    return past is not None and past.is_graph_input()
