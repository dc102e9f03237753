from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from vlmport.api.parity_render import print_report
from vlmport.api.parity_report import ParityReport


def printed(report: ParityReport, width: int = 100) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, no_color=True)
    with console.capture() as capture:
        print_report(report, console)
    return capture.get()


def test_a_passing_report_is_one_screen(passing: ParityReport) -> None:
    text = printed(passing)
    assert len(text.splitlines()) <= 20
    for check in ("preprocessing", "vision_encoder", "projector", "embed_tokens", "logits"):
        assert check in text
    assert "3 of 3 prompts equal" in text
    assert "all 21 tokens equal" in text
    assert "3 of 3 answers as alone" in text
    assert text.splitlines()[-1] == ("PASS  3 cases, 21 steps compared on a fake in float32, 1.2 s")
    assert "FAIL" not in text


def test_it_fits_a_narrow_terminal(passing: ParityReport) -> None:
    assert max(map(len, printed(passing, width=80).splitlines())) <= 80


def test_failures_come_after_the_table_before_near_ties(failing: ParityReport) -> None:
    text = printed(failing)
    first_fail = text.index("FAIL  vision_encoder, case 'picture'")
    assert first_fail < text.index("NEAR_TIE  decoder logits, case 'text', step 2")
    assert text.splitlines()[-1].startswith("FAIL  3 cases")


def test_texts_are_not_taken_for_markup(passing: ParityReport) -> None:
    case = replace(passing.cases[0], name="[bold]x[/bold] [/]")
    assert "[bold]x[/bold]" in printed(replace(passing, cases=(case,)))


def test_many_findings_are_cut_short(failing: ParityReport) -> None:
    text = printed(replace(failing, cases=failing.cases * 5))
    assert "more; --json and --html list them all" in text


def test_skipped_cases_are_told(passing: ParityReport) -> None:
    report = replace(passing, skipped=("case 'long': 99 prompt tokens; max_length 64",))
    assert "skipped  case 'long': 99 prompt tokens" in printed(report)


@pytest.mark.parametrize("cases", [0, 1])
def test_a_report_of_few_cases_is_shown(passing: ParityReport, cases: int) -> None:
    assert f"{cases} cases" in printed(replace(passing, cases=passing.cases[:cases]))
