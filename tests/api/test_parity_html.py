from __future__ import annotations

from dataclasses import replace

from support.html_page import Page

from vlmport.api.parity_html import report_html
from vlmport.api.parity_report import ParityReport
from vlmport.api.parity_summary import shown


def test_it_is_one_well_formed_file_without_links(failing: ParityReport) -> None:
    content = report_html(failing)
    page = Page(content)
    assert not {"script", "link", "img", "iframe", "a", "object", "embed"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in page.attributes}
    assert "://" not in content
    assert "url(" not in content
    assert "@import" not in content


def test_it_contains_every_number(failing: ParityReport) -> None:
    text = Page(report_html(failing)).text
    comparisons = [check.comparison for case in failing.cases for check in case.checks]
    comparisons += [step.comparison for case in failing.cases for step in case.steps]
    for comparison in comparisons:
        for number in (comparison.max_abs, comparison.mean_abs):
            assert shown(number) in text
        assert comparison.cosine is None or f"{comparison.cosine:.9f}" in text
    for case in failing.cases:
        assert all(shown(step.gap) in text for step in case.steps)
        assert " ".join(map(str, case.token_ids)) in text
        assert " ".join(map(str, case.reference_token_ids)) in text
    for finding in failing.findings:
        assert finding.message in text
    for row in failing.tolerances:
        assert row.reason in text
    assert "nan" not in text


def test_it_has_the_plots(passing: ParityReport) -> None:
    page = Page(report_html(passing))
    assert page.tags.count("svg") == 4 + 2 * len(passing.cases)
    assert "tolerance 1e-04" in page.text
    assert "near-tie margin 2e-04" in page.text


def test_steps_without_a_number_are_crossed(failing: ParityReport, passing: ParityReport) -> None:
    crosses = [value for name, value in Page(report_html(failing)).attributes if value == "cross"]
    assert len(crosses) == 2  # the NaN of one step, among all cases and in its own case
    assert "cross" not in {value for _, value in Page(report_html(passing)).attributes}


def test_texts_of_a_chat_are_escaped(passing: ParityReport) -> None:
    case = replace(passing.cases[0], prompt="<script>alert(1)</script>", text="<b>&amp;</b>")
    page = Page(report_html(replace(passing, cases=(case,))))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "<b>&amp;</b>" in page.text


def test_names_of_cases_are_escaped_in_plots(passing: ParityReport) -> None:
    case = replace(passing.cases[0], name='"><script>')
    page = Page(report_html(replace(passing, cases=(case,))))
    assert "script" not in page.tags


def test_a_report_without_cases_or_answers_is_shown(passing: ParityReport) -> None:
    assert Page(report_html(replace(passing, cases=()))).tags.count("svg") == 4
    empty = replace(passing.cases[0], steps=(), token_ids=(), error_counts=(), batch=None)
    assert "0 steps compared" in Page(report_html(replace(passing, cases=(empty,)))).text


def test_it_knows_dark_mode(passing: ParityReport) -> None:
    assert "prefers-color-scheme: dark" in report_html(passing)
