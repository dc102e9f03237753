from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.hand_quantized import crush, quantize_weights_

from vlmport.api.builtin_cases import builtin_cases
from vlmport.api.layer_groups import LayerGroup, layer_groups
from vlmport.api.progress import SilentProgress
from vlmport.api.reference_answers import (
    GreedyAnswer,
    ask_reference,
    measure_agreement,
    measure_answers,
)
from vlmport.api.sensitivity import (
    GroupDamage,
    fewest_in_float,
    lost_percent_without,
    rank_layers,
)
from vlmport.api.variants import variants_of
from vlmport.calibration.layers import find_layers
from vlmport.errors import CalibrationError
from vlmport.runtime import Request, VisionLanguageModel
from vlmport.runtime.messages import parse_messages

PLANTED = "language_model.model.layers.1.mlp.gate_proj+up_proj"
SILENT = SilentProgress()


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(trained_bundle)


@pytest.fixture(scope="module")
def answers(
    model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GreedyAnswer, ...]:
    requests = [
        Request(messages=parse_messages(case.messages), images=case.images)
        for case in builtin_cases()[1:4]
    ]
    return ask_reference(model, requests, tmp_path_factory.mktemp("logits"), SILENT)


def decoder_groups(bundle: Path) -> tuple[LayerGroup, ...]:
    return layer_groups("decoder", find_layers(ir.load(bundle / "decoder.onnx")))


def test_a_planted_damage_ranks_first(
    trained_bundle: Path, model: VisionLanguageModel, answers: tuple[GreedyAnswer, ...]
) -> None:
    def make_variant(graph: str, layers: Sequence[str]) -> ir.Model:
        variant = ir.load(trained_bundle / f"{graph}.onnx")
        quantize_weights_(variant, [name for name in layers if name != PLANTED])
        crush(variant, [name for name in layers if name == PLANTED], steps=1)
        return variant

    groups = decoder_groups(trained_bundle)[3:9]
    variants = variants_of(trained_bundle, model, make_variant)
    ranking = rank_layers(groups, variants, answers, SILENT)
    assert ranking[0].group.name == PLANTED
    assert ranking[0].group.modules == (
        "language_model.model.layers.1.mlp.gate_proj",
        "language_model.model.layers.1.mlp.up_proj",
    )
    assert {damage.group for damage in ranking} == set(groups)
    divergences = [damage.kl_mean for damage in ranking]
    assert divergences == sorted(divergences, key=lambda kl: -(kl or 0.0))
    assert (divergences[0] or 0.0) > 10 * (divergences[1] or 0.0) > 0.0
    budget = fewest_in_float(ranking, 0.0, lost_percent_without(groups, variants, answers, SILENT))
    assert [group.name for group in budget.kept] == [PLANTED]
    # The weights are linked while a session opens and must be readable afterwards.
    assert (trained_bundle / "decoder.onnx.data").stat().st_nlink == 1


def test_a_variant_of_no_layer_is_the_float_bundle(
    trained_bundle: Path, model: VisionLanguageModel, answers: tuple[GreedyAnswer, ...]
) -> None:
    def refuse(graph: str, layers: Sequence[str]) -> ir.Model:
        raise AssertionError(graph, layers)

    with variants_of(trained_bundle, model, refuse)({"decoder": ()}) as variant:
        agreement = measure_agreement(answers, variant, SILENT)
    assert agreement.kl_max == 0.0
    assert agreement.answers_equal == 1.0
    assert agreement.logits_snr_db is None


def test_the_led_model_parts_where_the_free_one_does(
    trained_bundle: Path, model: VisionLanguageModel, answers: tuple[GreedyAnswer, ...]
) -> None:
    def make_variant(graph: str, layers: Sequence[str]) -> ir.Model:
        variant = ir.load(trained_bundle / f"{graph}.onnx")
        crush(variant, layers, steps=2)
        return variant

    names = [group.layers[0] for group in decoder_groups(trained_bundle)[:6]]
    with variants_of(trained_bundle, model, make_variant)({"decoder": names}) as variant:
        led = measure_answers(answers, variant, SILENT)
        free = [variant.generate_batch([answer.request])[0] for answer in answers]
    assert any(answer.first_difference is not None for answer in led)
    for answer, one, result in zip(answers, led, free, strict=True):
        assert one.text == result.text
        pairs = zip(answer.token_ids, result.token_ids, strict=False)
        parts = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
        assert one.first_difference == parts


def ranking(count: int) -> list[GroupDamage]:
    return [
        GroupDamage(LayerGroup("g", f"m{index}", (f"m{index}",), (f"m{index}",)), 1.0, 1.0, 1.0, 9)
        for index in range(count)
    ]


class Measure:
    def __init__(self, percents: Sequence[float]) -> None:
        self.percents = percents
        self.asked: list[int] = []

    def __call__(self, kept: Sequence[LayerGroup]) -> float:
        assert [group.name for group in kept] == [f"m{index}" for index in range(len(kept))]
        self.asked.append(len(kept))
        return self.percents[len(kept)]


@pytest.mark.parametrize("wanted", range(10))
def test_the_fewest_groups_are_found(wanted: int) -> None:
    percents = [float(max(0, 10 - index)) for index in range(10)]
    measure = Measure(percents)
    budget = fewest_in_float(ranking(9), percents[wanted], measure)
    assert len(budget.kept) == wanted
    assert budget.lost_percent == percents[wanted]
    assert budget.is_monotone
    assert measure.asked[-1] == wanted
    assert len(measure.asked) <= 7


def test_where_more_groups_lose_more_all_shorter_beginnings_are_tried() -> None:
    # Halving goes 0, 8, 4 (9 > 6: contradicts), 6, 5 and would end at 6; 2 meets the budget.
    percents = [7.0, 8.0, 0.5, 3.0, 9.0, 5.0, 1.0, 0.0, 0.0]
    budget = fewest_in_float(ranking(8), 1.0, Measure(percents))
    assert len(budget.kept) == 2
    assert not budget.is_monotone
    assert dict(budget.measured)[2] == 0.5


def test_a_budget_that_float_itself_misses_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="2 percent of the next tokens lost with all 3"):
        fewest_in_float(ranking(3), 1.0, Measure([9.0, 8.0, 7.0, 2.0]))


def test_a_measurement_that_does_not_repeat_itself_is_an_error() -> None:
    lost = iter([0.5, 3.0])
    with pytest.raises(CalibrationError, match=r"lost 0\.5 percent .* then 3 percent"):
        fewest_in_float(ranking(3), 1.0, lambda kept: next(lost))


@pytest.mark.parametrize("percent", [-1.0, 101.0, float(np.nan)])
def test_a_budget_is_a_percentage(percent: float) -> None:
    with pytest.raises(CalibrationError, match="accuracy budget: found"):
        fewest_in_float(ranking(3), percent, Measure([0.0] * 4))
