from __future__ import annotations

import json
from typing import Any

import pytest

from vlmport.api.parity_report import (
    ParityReport,
    report_from_json,
    report_json,
    worst_verdict,
)


def reject(literal: str) -> Any:
    pytest.fail(f"{literal} is no JSON")


def test_a_report_survives_json(passing: ParityReport) -> None:
    assert report_from_json(report_json(passing)) == passing


def test_a_failing_report_survives_json_without_nan(failing: ParityReport) -> None:
    content = report_json(failing)
    json.loads(content, parse_constant=reject)
    assert report_from_json(content) == failing


def test_json_holds_every_number(failing: ParityReport) -> None:
    fields = json.loads(report_json(failing))
    assert (fields["schema_version"], fields["verdict"]) == (2, "FAIL")
    case = fields["cases"][0]
    assert len(case["steps"]) == 3
    assert {"max_abs", "mean_abs", "cosine"} <= set(case["steps"][0]["comparison"])
    assert case["fork"]["is_near_tie"] is True
    assert fields["tolerances"][0]["reason"]
    assert len(case["error_counts"]) == len(fields["error_bin_edges"]) + 1


def test_the_worst_verdict_counts() -> None:
    assert worst_verdict([]) == "PASS"
    assert worst_verdict(["PASS", "NEAR_TIE"]) == "NEAR_TIE"
    assert worst_verdict(["FAIL", "NEAR_TIE", "PASS"]) == "FAIL"
