"""What the pages about Triton list is what the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from support.triton_configs import BACKENDS, configs_of, repository

from vlmport.runtime.serving.options import ServingOptions
from vlmport.runtime.triton.answer_model import INPUTS, OUTPUTS
from vlmport.runtime.triton_model import parameters, serving_metrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
REPOSITORY_PAGE = (DOCS / "triton.md").read_text(encoding="utf-8")
MODEL_PAGE = (DOCS / "triton-model.md").read_text(encoding="utf-8")


def test_the_parameters_of_configurations_are_listed() -> None:
    section = REPOSITORY_PAGE.partition("## Parameters of config.pbtxt")[2].partition("\n## ")[0]
    cells = [row.split("|")[2] for row in section.splitlines() if row.startswith("| ")]
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    written = {
        key
        for backend in BACKENDS
        for config in configs_of(repository("tinyllava", backend)).values()
        for key in config.parameters
    }
    # Those that are left out follow from the bundle and the machine.
    assert listed == written | {field.name for field in fields(ServingOptions)} | {"threads"}


def test_tensors_parameters_and_metrics_of_the_main_model_are_listed() -> None:
    names = [tensor.name for tensor in (*INPUTS, *OUTPUTS)]
    assert [name for name in (*names, *parameters._KNOWN) if f"`{name}`" not in MODEL_PAGE] == []
    families = {**serving_metrics._GAUGES, **serving_metrics._COUNTERS}.values()
    exported = {f"vlmport_{name}" for name, _ in families}
    assert set(re.findall(r"`(vlmport_\w+)`", MODEL_PAGE)) == exported
