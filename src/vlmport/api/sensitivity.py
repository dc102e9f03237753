"""Which layers cost a model its answers when they are quantized, and which to keep in float."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from vlmport.api.progress import SilentProgress
from vlmport.api.reference_answers import measure_agreement
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vlmport.api.agreement import Agreement
    from vlmport.api.layer_groups import LayerGroup
    from vlmport.api.progress import Progress
    from vlmport.api.reference_answers import GreedyAnswer
    from vlmport.api.variants import OpenVariant

__all__ = [
    "FloatBudget",
    "GroupDamage",
    "fewest_in_float",
    "lost_percent_without",
    "rank_layers",
]


@dataclass(frozen=True, slots=True)
class GroupDamage:
    """What quantizing one group alone does to the model's next tokens.

    Attributes:
        group: the layers, by their modules.
        kl_mean: mean divergence of the next-token distribution from float's; None if logits became
            NaN or Inf.
        kl_max: the largest.
        top1_lost_percent: next tokens, in percent, whose likeliest one is another than float's.
        steps: next tokens in all.
    """

    group: LayerGroup
    kl_mean: float | None
    kl_max: float | None
    top1_lost_percent: float
    steps: int


@dataclass(frozen=True, slots=True)
class FloatBudget:
    """The groups that are kept in float so that a budget is met.

    Attributes:
        kept: the first groups of the ranking.
        lost_percent: next tokens, in percent, whose likeliest one is another than float's, with
            all other groups quantized.
        budget_percent: what was allowed.
        measured: (groups kept, percent lost) of every measurement, in the order of the first.
        is_monotone: whether keeping more groups never lost more, as far as was measured. If not,
            every number of groups below was tried.
    """

    kept: tuple[LayerGroup, ...]
    lost_percent: float
    budget_percent: float
    measured: tuple[tuple[int, float], ...]
    is_monotone: bool


def rank_layers(
    groups: Sequence[LayerGroup],
    quantized_variant: OpenVariant,
    answers: Sequence[GreedyAnswer],
    progress: Progress,
) -> tuple[GroupDamage, ...]:
    """Quantizes each group alone and sorts by what that does to the answers, the worst first.

    Args:
        groups: of all graphs that may be quantized.
        quantized_variant: opens the bundle with only these layers quantized.
        answers: of the float bundle, from `ask_reference`.
        progress: is told of each group.
    """
    damages = []
    progress.start("quantizing one group of layers at a time", len(groups))
    for group in groups:
        with quantized_variant({group.graph: group.layers}) as model:
            agreement = measure_agreement(answers, model, SilentProgress())
        damages.append(_damage(group, agreement))
        progress.advance(1)
    progress.finish()
    return tuple(sorted(damages, key=_severity, reverse=True))


def fewest_in_float(
    ranking: Sequence[GroupDamage],
    budget_percent: float,
    measure: Callable[[Sequence[LayerGroup]], float],
) -> FloatBudget:
    """Finds the shortest beginning of a ranking that, kept in float, meets a budget.

    Halves the interval, which is right as long as keeping one more group never loses more. Where a
    measurement contradicts that, all shorter beginnings are tried as well. What is returned has
    been measured twice.

    Args:
        ranking: from `rank_layers`, the worst first.
        budget_percent: most next tokens, in percent, whose likeliest one may be another.
        measure: the percentage with these groups kept in float and all others quantized; see
            `lost_percent_without`.

    Raises:
        CalibrationError: if the budget is not met with all groups in float, or the result does not
            meet it when it is measured again.
    """
    if not 0.0 <= budget_percent <= 100.0:
        msg = f"accuracy budget: found {budget_percent:g} percent; expected 0 to 100"
        raise CalibrationError(msg)
    groups = [damage.group for damage in ranking]
    lost: dict[int, float] = {}

    def loses(count: int) -> float:
        if count not in lost:
            lost[count] = measure(groups[:count])
        return lost[count]

    count = _halve(len(groups), budget_percent, loses)
    is_monotone = _is_monotone(lost)
    if not is_monotone:
        count = next(few for few in range(count + 1) if loses(few) <= budget_percent)
    again = measure(groups[:count])
    if again > budget_percent:
        msg = (
            f"accuracy budget: {count} groups in float lost {lost[count]:.3g} percent of the next "
            f"tokens, then {again:.3g} percent; the budget is {budget_percent:g}; the measurement "
            "does not repeat itself: check that nothing else changes the bundle"
        )
        raise CalibrationError(msg)
    return FloatBudget(
        tuple(groups[:count]), again, budget_percent, tuple(lost.items()), is_monotone
    )


def lost_percent_without(
    groups: Sequence[LayerGroup],
    quantized_variant: OpenVariant,
    answers: Sequence[GreedyAnswer],
    progress: Progress,
) -> Callable[[Sequence[LayerGroup]], float]:
    """What `fewest_in_float` measures with: all groups but the kept ones quantized together.

    Args:
        groups: all of them.
        quantized_variant: opens the bundle with only these layers quantized.
        answers: of the float bundle.
        progress: is told of each question of each measurement.
    """

    def measure(kept: Sequence[LayerGroup]) -> float:
        with quantized_variant(_all_but(groups, kept)) as model:
            return measure_agreement(answers, model, progress).top1_lost_percent

    return measure


def _halve(most: int, budget_percent: float, loses: Callable[[int], float]) -> int:
    if loses(0) <= budget_percent:
        return 0
    if loses(most) > budget_percent:
        msg = (
            f"accuracy budget: found {loses(most):.3g} percent of the next tokens lost with all "
            f"{most} groups of layers in float; the budget is {budget_percent:g}; what is left is "
            "not due to quantized layers: allow more, or keep the element type of the bundle"
        )
        raise CalibrationError(msg)
    too_few, enough = 0, most
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if loses(middle) <= budget_percent:
            enough = middle
        else:
            too_few = middle
    return enough


def _is_monotone(lost: Mapping[int, float]) -> bool:
    percents = [lost[count] for count in sorted(lost)]
    return all(fewer >= more for fewer, more in pairwise(percents))


def _all_but(
    groups: Sequence[LayerGroup], kept: Sequence[LayerGroup]
) -> dict[str, tuple[str, ...]]:
    layers: dict[str, tuple[str, ...]] = {}
    for group in groups:
        if group not in kept:
            layers[group.graph] = (*layers.get(group.graph, ()), *group.layers)
    return layers


def _damage(group: LayerGroup, agreement: Agreement) -> GroupDamage:
    return GroupDamage(
        group,
        agreement.kl_mean,
        agreement.kl_max,
        agreement.top1_lost_percent,
        agreement.steps,
    )


def _severity(damage: GroupDamage) -> tuple[float, float]:
    kl = float("inf") if damage.kl_mean is None else damage.kl_mean
    return kl, damage.top1_lost_percent
