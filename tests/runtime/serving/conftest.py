from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.served_models import HeldModel, served_model

from vlmport.runtime import GenerationService, ServingOptions


@pytest.fixture
def model() -> HeldModel:
    return HeldModel.of(served_model("tinyllava"))


@pytest.fixture
def service(model: HeldModel) -> Iterator[GenerationService]:
    with GenerationService(model, ServingOptions(num_slots=2, max_queue=2)) as opened:
        yield opened
        model.slots.let()
