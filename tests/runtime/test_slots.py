"""Sequences that join and leave: slots of one cache, each beside the same sequence alone."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from support.device_scenarios import endless
from support.slot_scenarios import check_trace, questions
from support.trained import exported
from tiny.recipes import RECIPES

from vlmport.api.tolerances import tolerance_for

if TYPE_CHECKING:
    from vlmport.runtime import VisionLanguageModel

FLOAT32 = tolerance_for("logits", "float32").max_abs
FAMILIES = sorted(RECIPES)


def cuts(model: VisionLanguageModel) -> bool:
    return model.manifest.attention.prompt == "causal"


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_answer_as_a_sequence_alone(family: str) -> None:
    model = endless(exported(family))
    asked = questions(model, model, 40, texts=(1, 63, 64, 150, 700))
    with closing(model._backend.start_slots(6, 3000)) as slots:
        report = check_trace(slots, asked, cuts=cuts(model), count=60, atol=FLOAT32)
    assert min(report.counts.values()) > 5, report
