from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from replicas import MARKS, Demand, MeasuredPoint, main, points_of, replicas
from support.fake_triton import FakeTriton

from vlmport.api.load import LoadOptions, load
from vlmport.api.load_report import load_json
from vlmport.api.progress import SilentProgress
from vlmport.runtime.request import Request

SLOW = MeasuredPoint("1 requests/s", 1.0, 2.0, 300.0, 40.0, 0)
FULL = MeasuredPoint("4 requests/s", 4.0, 3.0, 900.0, 60.0, 0)
TOO_FULL = MeasuredPoint("8 requests/s", 5.0, 9.0, 4000.0, 90.0, 0)
REFUSING = MeasuredPoint("9 requests/s", 6.0, 1.0, 100.0, 10.0, 1)
POINTS = [SLOW, FULL, TOO_FULL, REFUSING]


def test_the_largest_load_within_the_limits_is_what_a_replica_carries() -> None:
    found = replicas(POINTS, Demand(rate=20, ttft_ms=1000))
    assert found is not None
    assert found.point is FULL
    # 20 / (0.7 * 4) = 7.1; 20 * 3 / (0.7 * 8) = 10.7; one may be missing.
    assert (found.for_rate, found.for_slots, found.total) == (8, 11, 12)


def test_more_slots_leave_the_rate_to_decide() -> None:
    found = replicas(POINTS, Demand(rate=20, ttft_ms=1000, slots=64, utilisation=0.5, spare=0))
    assert found is not None
    assert (found.for_rate, found.for_slots, found.total) == (10, 2, 10)


def test_a_load_that_fails_requests_does_not_count() -> None:
    found = replicas(POINTS, Demand(rate=1))
    assert found is not None
    assert found.point is TOO_FULL


def test_limits_that_no_load_keeps_have_no_answer() -> None:
    assert replicas(POINTS, Demand(rate=1, ttft_ms=10)) is None
    assert replicas(POINTS, Demand(rate=1, inter_token_ms=39)) is None


def written(folder: Path, *points: dict[str, Any]) -> Path:
    path = folder / "load.json"
    path.write_text(json.dumps({"points": points}), encoding="utf-8")
    return path


def point(rate: float, ttft_ms: float, completed: int = 10) -> dict[str, Any]:
    times = {"mean": ttft_ms, "p95": ttft_ms}
    figures = {
        "completed": completed,
        "failed": 0,
        "requests_per_second": rate,
        "latency_ms": {"mean": 500.0, "p95": 900.0},
        "ttft_ms": times,
        "inter_token_ms": None,
    }
    return {"clients": None, "rate": rate, "figures": figures}


def test_the_arithmetic_is_printed_and_put_into_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    file = written(tmp_path, point(2.0, 100.0), point(4.0, 700.0))
    assert main([str(file), "--rate", "10", "--ttft-ms", "500", "--into", str(page)]) == 0
    out = capsys.readouterr().out
    assert "| 2 requests/s | 2.00 | 0.500 | 100.0 | 0.0 | 0 | yes |" in out
    assert "| 4 requests/s | 4.00 | 0.500 | 700.0 | 0.0 | 0 | no |" in out
    assert "throughput: 10 / (0.7 · 2.00) = 7.14, so 8" in out
    assert "slots: 10 · 0.500 = 5.00 under way, / (0.7 · 8) = 0.89, so 1" in out
    assert "**replicas: max(8, 1) + 1 = 9**" in out
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{MARKS[0]}\n{out.rstrip()}\n{MARKS[1]}\nafter\n"


def test_limits_that_no_load_keeps_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, point(2.0, 100.0), point(1.0, 0.0, completed=0))
    assert main([str(file), "--rate", "10", "--ttft-ms", "50"]) == 1
    assert "measure lower rates" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [("--rate", "0"), ("--utilisation", "1.5"), ("--slots", "0"), ("--spare", "-1")]
)
def test_values_out_of_range_are_refused(tmp_path: Path, wrong: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(written(tmp_path, point(2.0, 1.0))), "--rate", "1", *wrong])
    assert caught.value.code == 2


def test_what_load_writes_is_read() -> None:
    with FakeTriton().grpc() as url:
        requests = (Request(prompt="one two"),)
        options = LoadOptions(url, requests, clients=(1, 2), rates=(50.0,), count=5)
        report = load(options, SilentProgress())
    found = points_of(json.loads(load_json(report)))
    assert [one.load for one in found] == ["1 client", "2 clients", "50 requests/s"]
    assert all(one.requests_per_second > 0 and one.failed == 0 for one in found)
    assert all(0 < one.ttft_ms <= 1e3 * 5 and math.isfinite(one.latency_s) for one in found)


def test_the_page_has_the_marks() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "deploy" / "scaling.md"
    text = page.read_text(encoding="utf-8")
    assert [text.count(mark) for mark in MARKS] == [1, 1]
