from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.parity_fakes import FakeModel, FakeReference, fake_cases

from vlmport.api.parity import ParityOptions, compare, make_report
from vlmport.api.parity_report import ParityReport
from vlmport.api.progress import SilentProgress
from vlmport.contract import Manifest

MakeReport = Callable[[FakeModel], ParityReport]


@pytest.fixture
def report_of(sample_manifest: Manifest) -> MakeReport:
    def make(model: FakeModel) -> ParityReport:
        cases = compare(model.reference, model, fake_cases(), 16, SilentProgress())
        options = ParityOptions(Path("the checkpoint"), Path("the bundle"))
        report = make_report(options, sample_manifest, cases, backend="a fake")
        return replace(report, seconds=1.25)

    return make


@pytest.fixture
def passing(report_of: MakeReport) -> ParityReport:
    return report_of(FakeModel())


@pytest.fixture
def failing(report_of: MakeReport) -> ParityReport:
    """A report with a fault of every kind: values, NaN, a shape, a fork, a near tie."""

    def tie(logits: NDArray[np.float32]) -> None:
        logits[2, 7], logits[2, 8] = 9.0, 8.9999

    def edit(name: str, logits: NDArray[np.float32]) -> None:
        if name == "picture":
            logits[3, 5] = 20.0
            logits[1, 4] = np.nan
        if name == "text":
            logits[2, 7], logits[2, 8] = 8.99994, 8.99997

    def narrower(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return features[:, :-1] if len(features) == 2 else features * np.float32(1.01)

    return report_of(
        FakeModel(FakeReference(edit_logits=tie), {"vision_encoder": narrower}, edit_logits=edit)
    )
